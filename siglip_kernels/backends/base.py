"""What a backend supplies to the schedule: the block kernel."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import gemm
from siglip_kernels.pairs import PairSpec
from siglip_kernels.teachers import TeacherLogits

ENOUGH_PAIRS = 1024


class Problem(NamedTuple):
    """The properties of a call by which a block kernel is chosen and sized."""

    M: int  # images
    N: int  # texts
    D: int  # features
    dtype: torch.dtype  # of the features
    device: torch.device
    needs_dz: bool = True  # some feature gradient is needed
    has_weights: bool = False  # pairs have weights, masses, a balance or teachers
    teacher_width: int = 0  # features of the widest teacher; 0: none
    by_image: bool = False  # the loss of each image is wanted, and no gradient

    @property
    def rounds_out(self) -> bool:
        """Whether the rounding of a half-precision dz averages out. With few pairs a gradient may show all of it."""
        return self.M * self.N >= ENOUGH_PAIRS


def dx_scale(scale: Tensor, dz_scale: Tensor | None) -> Tensor:
    """[] t / dz_scale, or t where dz has no scale."""
    return scale if dz_scale is None else scale / dz_scale


class LossTask(NamedTuple):
    """The values of a loss that is one block, and what they need."""

    loss: Tensor  # [] the scale's dtype, out
    scalars: Tensor  # [4] the same, out: loss, dscale, dbias, grad_scale
    images: int  # the loss's denominator is images · texts
    texts: int

    def write(self, sums: Tensor, dx_scale: Tensor) -> None:
        """From the block's sums and the factor from dz @ y to dx, both without the denominator."""
        sums[3] = dx_scale
        torch.div(sums, float(self.images) * self.texts, out=self.scalars)
        self.loss.copy_(self.scalars[0])


class BlockTask(NamedTuple):
    """One block of r images and c texts, and its outputs. A block kernel does not write outputs that are None."""

    x: Tensor  # [r, D] operand dtype, rows contiguous
    y: Tensor  # [c, D] the same
    scale: Tensor  # [] float32, or float64 for float64 features
    bias: Tensor  # [] the same dtype
    pairs: PairSpec  # of this block, prepared: ids int64, weights and masses in the scale's dtype
    # [4], the last is free. Out: the block's sums of w·softplus(-s·z), dz·<x_i, y_j> and dz; float64 (float32 if the
    # device has none). A pair that is left out adds nothing, as if s·z were inf. loss.py says what masses change.
    sums: Tensor
    # [r, c] operand dtype, out: dz_scale · -s·w·σ(-s·z). Rows start on multiples of 16 elements: TMA writes the last 16
    # bytes of a row whole, up to seven elements beyond c.
    dz: Tensor | None
    dz_scale: Tensor | None  # [] a power of two that keeps float16 from underflow; None: 1. Sums never contain it
    workspace: Any  # from BlockKernel.workspace
    loss_only: bool = False  # no gradient is needed at all: only sums[0] will be read
    may_replace: bool = False  # another kernel may do the block if this one is found faulty; else that is an error
    result: LossTask | None = None  # out, for a kernel that writes_result
    stats: Tensor | None = None  # [8] the dtype of sums, out, in the layout of stats.py
    dx: Tensor | None = None  # [r, D] accumulator dtype, rows contiguous, out: dz @ y, added with accumulate_dx
    accumulate_dx: bool = False
    dy: Tensor | None = None  # [c, D] the same: dzᵀ @ x, added with accumulate_dy
    accumulate_dy: bool = False
    teacher: TeacherLogits | None = None  # of the block, where the pairs have teachers
    image_losses: Tensor | None = None  # [r] the dtype of sums, out, with loss_only: each image's part of sums[0]

    def dx_scale(self) -> Tensor:
        """[] t / dz_scale: the factor from dz @ y to dx, without the denominator."""
        return dx_scale(self.scale, self.dz_scale)


class BlockKernel(abc.ABC):
    """Forms dz and the partial sums of one block of the logits; ``schedule.py`` does the rest."""

    name: str
    writes_result: bool = False  # the values of a loss that is one block, so that the schedule need not
    pads_to_alignment: bool = False  # gemm.pad_to_alignment copies features that are not aligned

    def is_automatic(self, problem: Problem) -> bool:
        """Whether backend="auto" may take this kernel, if it can run the problem."""
        return True

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

    def inner_products(self, out: Tensor, x: Tensor, y: Tensor, workspace: Any) -> None:
        """``out = x @ y.T``: contiguous x [r, k] and y [c, k] of a teacher, of one dtype; out [r, c] of the logits'."""
        gemm.gemm_(out, x, y.T)

    def block_and_grads(self, task: BlockTask) -> None:
        """``block``, then the block's part of the feature gradients."""
        self.block(task)
        if task.dz is None:
            return
        if task.dx is not None:
            gemm.gemm_(task.dx, task.dz, task.y, accumulate=task.accumulate_dx)
        if task.dy is not None:
            gemm.gemm_(task.dy, task.dz.T, task.x, accumulate=task.accumulate_dy)
