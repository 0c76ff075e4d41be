"""The block loop: the loss and every gradient in one pass, with a workspace that does not grow with the batch.

    for each block of images R × block of texts C:
        dz, Σ loss, Σ dz·u, Σ dz = block kernel(x[R], y[C], …)
        dx[R] += dz  @ y[C]
        dy[C] += dzᵀ @ x[R]

dz is un-normalised: with the factor t / denominator it would underflow in half precision. That factor is applied once,
to the float32 accumulators: it is the ``grad_scale`` of the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockKernel, BlockTask, LossTask, Problem, dx_scale
from siglip_kernels.pairs import PairSpec
from siglip_kernels.request import NeedsGrad, Request
from siglip_kernels.stats import SIZE, reduce_stats
from siglip_kernels.teachers import TeacherLogits, teacher_logits

# |dz| is at most max(u)·max(v)·max(p, 1): the largest weights of the images and the texts, and positive_weight. In
# float16 it is stored times 2^(14 - e(u) - e(v) - e(p)), with max(u) < 2^e(u) (torch.frexp; 0 without weights) and
# p <= 2^e(p). So it stays below 65504, and a sigmoid of 2^-36 under the largest weights is not yet 0.
FLOAT16_DZ_EXPONENT = 14
# Rows of the dz buffer start on multiples of 16 elements, for TMA and the library's fastest GEMMs. TMA writes the last
# 16 bytes of a row whole: up to seven elements of this padding.
DZ_ROW_MULTIPLE = 16


class Result(NamedTuple):
    """The loss and the gradients, as the block loop leaves them. Gradients not needed are empty or meaningless."""

    loss: Tensor  # [] float32 or float64; by_image: [M], and no denominator
    scalars: Tensor  # [4] the same dtype: loss, dscale, dbias, grad_scale
    dx: Tensor  # [M, D] the same dtype; the gradient is grad_scale · dx
    dy: Tensor  # [N, D] the same dtype; the gradient is grad_scale · dy
    stats: Tensor | None = None  # [8] in the layout of stats.py, with return_stats


def problem_of(request: Request, needs_grad: NeedsGrad) -> Problem:
    """What is needed to choose and to size a block kernel."""
    x = request.x
    M, D = x.shape
    pairs = request.pairs
    widths = [teacher.image_features.shape[1] for teacher in pairs.teachers]
    others = pairs.has_weighted_terms, max(widths) if widths else 0, request.by_image
    return Problem(M, request.y.shape[0], D, x.dtype, x.device, needs_grad.dz, *others)


def run(kernel: BlockKernel, problem: Problem, request: Request, needs_grad: NeedsGrad) -> Result:
    """The loss and its gradients, computed by ``kernel``. It only launches: nothing is read back to the host."""
    y, pairs = request.y.contiguous(), request.pairs
    loop = BlockLoop(kernel, problem, request, needs_grad)
    if loop.operand is torch.float16:
        weights = pairs.image_weights, pairs.text_weights
        loop.scale_dz(w.amax().to(loop.dtype) for w in weights if w is not None and w.numel())
    dy = loop.new_rows(problem.N if needs_grad.y else 0)
    if kernel.writes_result and not pairs.has_weights and not request.by_image:
        loop.counts = denominator_factors(request.reduction, problem.M, problem.N)
    loop.add(y, pairs, dy if needs_grad.y else None)
    if loop.written is not None:
        return Result(loop.written.loss, loop.written.scalars, loop.dx, dy, loop.total_stats())
    # Floats: torch takes longer to divide by an int.
    images = float(problem.M) if pairs.image_weights is None else total_weight(pairs.image_weights)
    texts = float(problem.N) if pairs.text_weights is None else total_weight(pairs.text_weights)
    return loop.result(denominator(request.reduction, images, texts), dy)


class BlockLoop:
    """The images of one process, and the sums that grow as texts are added."""

    def __init__(self, kernel: BlockKernel, problem: Problem, request: Request, needs_grad: NeedsGrad) -> None:
        """``problem``: its N is the largest number of texts that one ``add`` will get."""
        self.kernel, self.problem, self.needs_grad = kernel, problem, needs_grad
        self.return_stats = request.return_stats
        self.x = x = request.x.contiguous()
        self.dtype, self.sum_dtype = accumulator_dtype(x.dtype), sum_dtype(x.device)
        self.operand = kernel.operand_dtype(problem)
        R, C = kernel.block_shape(problem)
        self.block_shape = R, C = min(R, problem.M), min(C, problem.N)
        row = -(-C // DZ_ROW_MULTIPLE) * DZ_ROW_MULTIPLE
        self.dz = self._new(R if problem.needs_dz else 0, row, dtype=self.operand)
        self.workspace = kernel.workspace(problem, R, C)
        self.teacher_products = self._new(R, row) if problem.teacher_width else None
        self.scale = _scalar(request.scale, self.dtype)
        self.bias = x.new_zeros((), dtype=self.dtype) if request.bias is None else _scalar(request.bias, self.dtype)
        self.dz_scale: Tensor | None = None
        self.dx = self.new_rows(problem.M if needs_grad.x else 0)
        self.may_replace = request.backend == "auto"
        self.positive_weight = request.pairs.positive_weight
        self.counts: tuple[int, int] | None = None  # the denominator's factors, if the kernel may write the result
        self.written: LossTask | None = None  # the result that the kernel has written, as the loss was one block
        self.image_losses = x.new_zeros(problem.M, dtype=self.sum_dtype) if request.by_image else None
        self.accumulate_dx = False  # whether dx holds something to add to
        self.sums: list[Tensor] = []  # [4] for each call of ``add``; the last element is unused
        self.stats: list[Tensor] = []  # [blocks, 8] for each call of ``add``, with return_stats

    def new_rows(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, D] for a gradient, uninitialised. The default dtype is that of the accumulators."""
        return self._new(rows, self.problem.D, dtype=dtype)

    def scale_dz(self, largest_weights: Iterable[Tensor]) -> None:
        """Choose a scale that keeps a float16 dz from underflow. ``largest_weights``: [] for each weighted side."""
        if self.problem.needs_dz and self.operand is torch.float16:
            exponent = FLOAT16_DZ_EXPONENT - math.ceil(math.log2(max(1.0, self.positive_weight)))
            self.dz_scale = _dz_scale(exponent, largest_weights, self.x.device)

    def add(
        self, y: Tensor, pairs: PairSpec, dy: Tensor | None, *, rows: slice | None = None, accumulate_dy: bool = False
    ) -> None:
        """Pair the images ``rows`` (None: all) with the texts y [n, D]; dy [n, D] is written or accumulated into."""
        rows = slice(0, self.problem.M) if rows is None else rows
        blocks = _blocks(rows, y.shape[0], *self.block_shape)
        if not blocks:
            if not self.accumulate_dx:
                self.dx.zero_()
            if dy is not None and not accumulate_dy:
                dy.zero_()
            return

        is_one = len(blocks) == 1  # without the views that it can do without: each costs as much as a small GEMM
        sums = self._new(4, dtype=self.sum_dtype) if is_one else self._new(len(blocks), 4, dtype=self.sum_dtype)
        sums_of_blocks = (sums,) if is_one else sums.unbind()
        pairs = pairs.prepared(self.x, y, self.dtype)
        stats = self._new_stats(len(blocks)) if self.return_stats else None
        block_losses = None if self.image_losses is None else torch.empty_like(self.image_losses)
        needs_dx, loss_only = self.needs_grad.x, not (self.problem.needs_dz or self.needs_grad.any)
        if is_one and self.counts is not None:
            self.written = LossTask(torch.empty_like(self.scale), self._new(4), *self.counts)

        for index, (r, c) in enumerate(blocks):
            if c.start == 0:
                x_block = _as(_rows(self.x, r), self.operand)
            y_block = _as(_rows(y, c), self.operand)
            block_pairs = pairs.block(r, c)
            task = BlockTask(
                x=x_block,
                y=y_block,
                scale=self.scale,
                bias=self.bias,
                pairs=block_pairs,
                sums=sums_of_blocks[index],
                dz=self._block_dz(x_block.shape[0], y_block.shape[0]),
                dz_scale=self.dz_scale,
                workspace=self.workspace,
                loss_only=loss_only,
                may_replace=self.may_replace,
                result=self.written,
                stats=None if stats is None else stats[index],
                dx=_rows(self.dx, r) if needs_dx else None,
                accumulate_dx=self.accumulate_dx or c.start > 0,
                dy=None if dy is None else _rows(dy, c),
                accumulate_dy=accumulate_dy or r.start > rows.start,
                teacher=self._teacher(block_pairs) if pairs.teachers else None,
                image_losses=None if block_losses is None else block_losses[r],
            )
            self.kernel.block_and_grads(task)
            if self.image_losses is not None and task.image_losses is not None:
                self.image_losses[r] += task.image_losses
            del task  # or it would hold this block's copies of the features while the next are made
        self.sums.append(sums if is_one else sums.sum(0))

    def dx_scale(self) -> Tensor:
        """[] t / dz_scale: the factor from the accumulated dz @ y to dx, without the denominator."""
        return dx_scale(self.scale, self.dz_scale)

    def result(self, denominator: float | Tensor, dy: Tensor) -> Result:
        """The loss and the gradients of all that was added; ``denominator``: of the loss."""
        totals = self._totals()
        totals[3] = self.dx_scale()
        scalars = torch.div(totals, denominator, out=self._new(4))
        loss = torch.select_copy(scalars, 0, 0) if self.image_losses is None else self.image_losses.to(self.dtype)
        return Result(loss, scalars, self.dx, dy, self.total_stats())

    def total_stats(self) -> Tensor | None:
        """[8] of all that was added, with return_stats."""
        return reduce_stats(self.stats, self.x.device, self.sum_dtype) if self.return_stats else None

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised. The default dtype is that of the accumulators."""
        return self.x.new_empty(*shape, dtype=dtype or self.dtype)

    def _block_dz(self, r: int, c: int) -> Tensor | None:
        """The dz buffer [r, c] of a block; None if dz itself is not needed."""
        if not self.problem.needs_dz:
            return None
        return self.dz if self.dz.shape == (r, c) else self.dz[:r, :c]

    def _teacher(self, pairs: PairSpec) -> TeacherLogits:
        """The logits of a block's teachers."""
        assert self.teacher_products is not None
        images, texts, *_ = pairs.teachers[0]
        products = self.teacher_products[: len(images), : len(texts)]
        return teacher_logits(pairs.teachers, products, partial(self.kernel.inner_products, workspace=self.workspace))

    def _new_stats(self, blocks: int) -> Tensor:
        """[blocks, 8], uninitialised; ``result`` combines them."""
        self.stats.append(self._new(blocks, SIZE, dtype=self.sum_dtype))
        return self.stats[-1]

    def _totals(self) -> Tensor:
        """[4]: loss, Σ dz·u, Σ dz, and a place for grad_scale."""
        if not self.sums:
            return self.x.new_zeros(4, dtype=self.sum_dtype)
        return self.sums[0] if len(self.sums) == 1 else torch.stack(self.sums).sum(0)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, loss, scalar gradients and accumulators, for features of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


@functools.cache
def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which the blocks' sums are added: float64; float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _rows(t: Tensor, rows: slice) -> Tensor:
    """``t[rows]``, without a view if that is all of ``t``. A view costs as much as the GEMM of a small problem."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _scalar(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t``, of one element, as [] of ``dtype``."""
    return _as(t if t.dim() == 0 else t.reshape(()), dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _blocks(rows: slice, N: int, R: int, C: int) -> list[tuple[slice, slice]]:
    """(images, texts) of every block, row-major: a block of images meets every text before the next one begins."""
    if 0 < rows.stop - rows.start <= R and 0 < N <= C:
        return [(rows, slice(0, N))]
    return [
        (slice(row, min(row + R, rows.stop)), slice(col, min(col + C, N)))
        for row in range(rows.start, rows.stop, max(R, 1))
        for col in range(0, N, max(C, 1))
    ]


def _dz_scale(largest: int, largest_weights: Iterable[Tensor], device: torch.device) -> Tensor:
    """[] float32, a power of two: 2^largest without weights, and so much less with them."""
    exponent = torch.full((), largest, dtype=torch.int32, device=device)
    for weight in largest_weights:
        exponent = exponent - torch.frexp(weight).exponent
    # Built from its bits: torch.ldexp and pow use the default dtype. float32 has exponents from -126 to 127.
    return ((exponent.clamp(-126, 126) + 127) << 23).view(torch.float32)


def denominator(reduction: str, images: float | Tensor, texts: float | Tensor) -> float | Tensor:
    """The loss's denominator, from the total weight of each side. 0 if nothing counts; the loss is then NaN."""
    of_images, of_texts = denominator_factors(reduction, images, texts)
    return of_images * of_texts


def denominator_factors(reduction: str, images: Any, texts: Any) -> tuple[Any, Any]:
    """The factors of the denominator: a count of images or 1, a count of texts or 1."""
    match reduction:
        case "sum":
            return 1, 1
        case "batchmean":
            return images, 1
        case "mean":
            return images, texts
    raise ValueError(f"reduction {reduction!r}")


def total_weight(weights: Tensor) -> Tensor:
    """[] the sum of ``weights``, in ``sum_dtype``."""
    return weights.sum(dtype=sum_dtype(weights.device))
