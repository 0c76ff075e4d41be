"""What a backend supplies to the schedule: the block kernel."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import gemm
from siglip_kernels.pairs import PairSpec

ENOUGH_PAIRS = 1024
# dz of a block on a GPU: 256 MiB, at which the blocks are large enough for full waves of tiles.
DZ_BYTES = 256 * 2**20
# Blocks are cut on multiples of the largest tile.
TILE = 128


class Problem(NamedTuple):
    """What a call asks for, as far as choosing and sizing a block kernel needs it."""

    M: int  # images
    N: int  # texts
    D: int  # features
    dtype: torch.dtype  # of the features
    device: torch.device
    needs_dz: bool = True  # some feature gradient is needed
    plain: bool = True  # no pair is left out or shares a mass, and no statistics are asked for

    @property
    def rounds_out(self) -> bool:
        """Whether the rounding of a half-precision dz averages out; of a few pairs it may show whole in a gradient."""
        return self.M * self.N >= ENOUGH_PAIRS


class BlockTask(NamedTuple):
    """One block of r images and c texts, and what a block kernel is to write of it; outputs that are None are not."""

    x: Tensor  # [r, D] operand dtype, rows contiguous
    y: Tensor  # [c, D] the same
    scale: Tensor  # [] float32, or float64 for float64 features
    bias: Tensor  # [] the same dtype
    pairs: PairSpec  # of this block, prepared: ids int64, weights and masses in the scale's dtype
    # Out: the sums of the block's w·softplus(-s·z), dz·<x_i, y_j> and dz, in the first 3 of float64 (float32 where the
    # device has no float64). A pair that is left out adds nothing, as if s·z were inf; loss.py says what masses change.
    sums: Tensor
    # [r, c] operand dtype, out: dz_scale · -s·w·σ(-s·z). Rows start on multiples of 16 elements: TMA writes the last 16
    # bytes of a row whole, up to seven elements beyond c.
    dz: Tensor | None
    dz_scale: Tensor | None  # [] a power of two that keeps float16 from underflow; None: 1. Never part of sums
    workspace: Any  # from BlockKernel.workspace
    loss_only: bool = False  # no gradient is needed at all: only sums[0] will be read
    stats: Tensor | None = None  # [8] the dtype of sums, out, as stats.py has it
    dx: Tensor | None = None  # [r, D] accumulator dtype, rows contiguous: dz @ y is written or, as said next, added
    accumulate_dx: bool = False
    dy: Tensor | None = None  # [c, D] the same: dzᵀ @ x
    accumulate_dy: bool = False


class BlockKernel(abc.ABC):
    """Forms dz and the partial sums of one block of the logits; ``schedule.py`` does the rest."""

    name: str
    pads_to_alignment: bool = False  # features are copied where their rows are not aligned, by gemm.pad_to_alignment
    unproven: str = ""  # what it has not shown yet, if anything: then only its name reaches it

    def is_automatic(self, problem: Problem) -> bool:
        """Whether backend="auto" may take this kernel, where it can run."""
        return not self.unproven

    @abc.abstractmethod
    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why this kernel cannot run the problem; empty when it can."""

    def prepare(self) -> list[str]:
        """Whatever it takes to run for the first time, such as compiling; every reason why that failed."""
        return []

    @abc.abstractmethod
    def operand_dtype(self, problem: Problem) -> torch.dtype:
        """The dtype of the feature blocks and of dz, as the block kernel and the GEMMs take them."""

    @abc.abstractmethod
    def block_shape(self, problem: Problem) -> tuple[int, int]:
        """(R, C): images and texts a block. Bounds the workspace whatever M and N are."""

    @abc.abstractmethod
    def workspace(self, problem: Problem, R: int, C: int) -> Any:
        """Uninitialised buffers that ``block`` needs, for blocks up to [R, C]; dz is not among them."""

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


def even_blocks(problem: Problem, pairs: int) -> tuple[int, int]:
    """(R, C) of at most ``pairs`` pairs, on multiples of TILE, for a device that large blocks fill.

    Twice as many texts as images where both sides are cut; either side is cut evenly.
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
