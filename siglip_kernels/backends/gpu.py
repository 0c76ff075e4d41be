"""What the GPUs' block kernels share: the size of their blocks, the proof at a first run, the sums of their parts."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from siglip_kernels.backends import verification
from siglip_kernels.backends.base import BlockKernel, BlockTask, Problem
from siglip_kernels.backends.compiled import is_installed, why_not_launch
from siglip_kernels.stats import reduce_stats

# Size of a block's dz: 256 MiB. Blocks are then large enough for full waves of tiles.
DZ_BYTES = 256 * 2**20
# Block sizes are multiples of the largest tile.
TILE = 128


class GpuBlockKernel(BlockKernel):
    """A kernel in several variants, each of which is compiled by itself and proves itself on the user's device."""

    pads_to_alignment = writes_result = True

    def __init__(self, dz_bytes: int = DZ_BYTES, blocks: tuple[int, int] | None = None) -> None:
        """``blocks``: (R, C), instead of even blocks within ``dz_bytes``."""
        self.dz_bytes, self.blocks = dz_bytes, blocks

    @abc.abstractmethod
    def variant(self, task: BlockTask) -> Hashable:
        """The compilation that a block needs. ``str`` describes it."""

    @abc.abstractmethod
    def launch(self, variant: Hashable, task: BlockTask) -> None:
        """``block``, with the variant that the block needs, on the current device: the task's."""

    def block(self, task: BlockTask) -> None:
        device = task.x.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.block(task)
            return
        variant = self.variant(task)
        if (variant, device) in verification.proven:
            self.launch(variant, task)
        else:
            verification.launch_unproven(self.name, variant, task, self.launch)

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        return problem.dtype if problem.rounds_out else torch.float32

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        # With teachers the products of theirs take float32 beside dz, and both together no more than twice dz alone.
        pairs = self.dz_bytes // self.operand_dtype(problem).itemsize // (2 if problem.teacher_width else 1)
        return self.blocks or even_block_shape(problem.M, problem.N, pairs)


def reduce_partials(task: BlockTask, partials: Tensor, stats_partials: Tensor | None) -> None:
    """Write ``task.sums``, ``task.result`` and ``task.stats`` from a kernel's parts, in a fixed order.

    ``partials`` is [3, parts] float32, of which with ``loss_only`` just the first row is written; ``stats_partials`` is
    [8, parts] float32, None without stats.
    """
    sum_by_triton = _sum_by_triton() if partials.is_cuda else None
    if sum_by_triton is not None:
        sum_by_triton(task, partials)
    else:
        sums, written = task.sums, 1 if task.loss_only else 3
        torch.sum(partials[:written], dim=1, dtype=sums.dtype, out=sums[:written])
        if task.result is not None:
            task.result.write(sums, task.dx_scale())
    if task.stats is not None and stats_partials is not None:
        dtype = task.stats.dtype
        task.stats.copy_(reduce_stats([stats_partials.T.to(dtype)], task.stats.device, dtype))


@functools.cache
def _sum_by_triton() -> Callable[[BlockTask, Tensor], None] | None:
    """One kernel for the sums and the result in place of five; None if Triton does not run here."""
    if not is_installed() or why_not_launch():
        return None
    from siglip_kernels.backends.triton.sums import sum_partials

    return sum_partials


@functools.lru_cache(maxsize=4096)
def even_block_shape(M: int, N: int, pairs: int) -> tuple[int, int]:
    """(R, C) of at most ``pairs`` pairs, in multiples of TILE, for a device that needs large blocks.

    Each side is cut evenly. If both are cut, a block has about twice as many texts as images.
    """
    R = _even_cut(M, math.isqrt(pairs // 2))
    C = _even_cut(N, pairs // R)
    if N <= C:
        R = _even_cut(M, pairs // C)
    return R, C


def _even_cut(length: int, limit: int) -> int:
    """The size of a block when ``length`` is cut evenly, on multiples of TILE, into blocks of at most ``limit``."""
    tiles, most = -(-length // TILE), max(1, limit // TILE)
    blocks = max(1, -(-tiles // most))
    return TILE * max(1, -(-tiles // blocks))
