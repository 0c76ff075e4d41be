"""What a backend supplies to the schedule: the block kernel."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import gemm
from siglip_kernels.pairs import PairSpec
from siglip_kernels.stats import reduce_stats

ENOUGH_PAIRS = 1024
# Size of a block's dz on a GPU: 256 MiB. Blocks are then large enough for full waves of tiles.
DZ_BYTES = 256 * 2**20
# Block sizes are multiples of the largest tile.
TILE = 128


class Problem(NamedTuple):
    """The properties of a call by which a block kernel is chosen and sized."""

    M: int  # images
    N: int  # texts
    D: int  # features
    dtype: torch.dtype  # of the features
    device: torch.device
    needs_dz: bool = True  # some feature gradient is needed

    @property
    def rounds_out(self) -> bool:
        """Whether the rounding of a half-precision dz averages out. With few pairs a gradient may show all of it."""
        return self.M * self.N >= ENOUGH_PAIRS


class BlockTask(NamedTuple):
    """One block of r images and c texts, and its outputs. A block kernel does not write outputs that are None."""

    x: Tensor  # [r, D] operand dtype, rows contiguous
    y: Tensor  # [c, D] the same
    scale: Tensor  # [] float32, or float64 for float64 features
    bias: Tensor  # [] the same dtype
    pairs: PairSpec  # of this block, prepared: ids int64, weights and masses in the scale's dtype
    # Out: the block's sums of w·softplus(-s·z), dz·<x_i, y_j> and dz, in the first 3 elements; float64 (float32 if the
    # device has no float64). A pair that is left out adds nothing, as if s·z were inf. loss.py says what masses change.
    sums: Tensor
    # [r, c] operand dtype, out: dz_scale · -s·w·σ(-s·z). Rows start on multiples of 16 elements: TMA writes the last 16
    # bytes of a row whole, up to seven elements beyond c.
    dz: Tensor | None
    dz_scale: Tensor | None  # [] a power of two that keeps float16 from underflow; None: 1. Sums never contain it
    workspace: Any  # from BlockKernel.workspace
    loss_only: bool = False  # no gradient is needed at all: only sums[0] will be read
    stats: Tensor | None = None  # [8] the dtype of sums, out, in the layout of stats.py
    dx: Tensor | None = None  # [r, D] accumulator dtype, rows contiguous, out: dz @ y, added with accumulate_dx
    accumulate_dx: bool = False
    dy: Tensor | None = None  # [c, D] the same: dzᵀ @ x, added with accumulate_dy
    accumulate_dy: bool = False


class BlockKernel(abc.ABC):
    """Forms dz and the partial sums of one block of the logits; ``schedule.py`` does the rest."""

    name: str
    pads_to_alignment: bool = False  # gemm.pad_to_alignment copies features that are not aligned
    unproven: str = ""  # what it has not proven yet, if anything: then only its name selects it

    def is_automatic(self, problem: Problem) -> bool:
        """Whether backend="auto" may take this kernel, if it can run the problem."""
        return not self.unproven

    @abc.abstractmethod
    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot run the problem; empty when it can."""

    def prepare(self) -> list[str]:
        """Do what the first run needs, such as compiling. Returns every reason why that failed."""
        return []

    @abc.abstractmethod
    def operand_dtype(self, problem: Problem) -> torch.dtype:
        """The dtype of the feature blocks and of dz, as the block kernel and the GEMMs take them."""

    @abc.abstractmethod
    def block_shape(self, problem: Problem) -> tuple[int, int]:
        """(R, C): images and texts per block. This bounds the workspace for any M and N."""

    @abc.abstractmethod
    def workspace(self, problem: Problem, R: int, C: int) -> Any:
        """Uninitialised buffers that ``block`` needs, for blocks up to [R, C]. dz is not one of them."""

    @abc.abstractmethod
    def block(self, task: BlockTask) -> None:
        """Write ``sums``, ``dz`` and ``stats`` of the block; read nothing back to the host."""

    def block_and_grads(self, task: BlockTask) -> None:
        """``block``, then the block's part of the feature gradients."""
        self.block(task)
        if task.dz is None:
            return
        if task.dx is not None:
            gemm.gemm_(task.dx, task.dz, task.y, accumulate=task.accumulate_dx)
        if task.dy is not None:
            gemm.gemm_(task.dy, task.dz.T, task.x, accumulate=task.accumulate_dy)


def reduce_partials(task: BlockTask, partials: Tensor, stats_partials: Tensor | None) -> None:
    """Write ``task.sums`` and ``task.stats`` from a GPU kernel's parts, in a fixed order.

    ``partials`` is [3, parts] float32, of which with ``loss_only`` just the first row is written; ``stats_partials`` is
    [8, parts] float32, None without stats.
    """
    sums, written = task.sums, 1 if task.loss_only else 3
    torch.sum(partials[:written], dim=1, dtype=sums.dtype, out=sums[:written])
    if task.stats is not None and stats_partials is not None:
        dtype = task.stats.dtype
        task.stats.copy_(reduce_stats([stats_partials.T.to(dtype)], task.stats.device, dtype))


def even_block_shape(problem: Problem, pairs: int) -> tuple[int, int]:
    """(R, C) of at most ``pairs`` pairs, in multiples of TILE, for a device that needs large blocks.

    Each side is cut evenly. If both are cut, a block has about twice as many texts as images.
    """
    R = _even_cut(problem.M, math.isqrt(pairs // 2))
    C = _even_cut(problem.N, pairs // R)
    if problem.N <= C:
        R = _even_cut(problem.M, pairs // C)
    return R, C


def _even_cut(length: int, limit: int) -> int:
    """The size of a block when ``length`` is cut evenly, on multiples of TILE, into blocks of at most ``limit``."""
    tiles, most = -(-length // TILE), max(1, limit // TILE)
    blocks = max(1, -(-tiles // most))
    return TILE * max(1, -(-tiles // blocks))
