"""The block loop: the loss and every gradient in one pass, with a workspace that the batch cannot grow.

    for each block of images R × block of texts C:
        dz, Σ loss, Σ dz·u, Σ dz = block kernel(x[R], y[C], …)
        dx[R] += dz  @ y[C]
        dy[C] += dzᵀ @ x[R]

dz is un-normalised. The factor t / denominator, which would underflow in half precision, is left to whoever reads the
float32 accumulators: it is the ``gain`` of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.pairs import PairSpec

# |dz| is at most max(w). In float16 it travels times 2^14 / 2^⌈log2 max(w)⌉: 65504 holds it, and 2^-38 is not yet 0.
FLOAT16_DZ_EXPONENT = 14
# Rows of the dz buffer start on multiples of 16 elements, as TMA and the library's fastest products want.
DZ_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Wanted:
    """The gradients that are asked for."""

    dx: bool = True
    dy: bool = True
    dscale: bool = True
    dbias: bool = True

    @property
    def dz(self) -> bool:
        return self.dx or self.dy

    @property
    def any(self) -> bool:
        return self.dz or self.dscale or self.dbias


@dataclass(frozen=True)
class Result:
    """The loss, and the gradients as they come out of the block loop; unwanted ones are empty or meaningless."""

    loss: Tensor  # [] float32 or float64
    scalars: Tensor  # [4] the same dtype: loss, dscale, dbias, gain
    dx: Tensor  # [M, D] the same dtype; the gradient is gain · dx
    dy: Tensor  # [N, D] the same dtype; the gradient is gain · dy


def run(
    kernel: BlockKernel,
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # one element
    bias: Tensor | None,  # one element
    pairs: PairSpec,
    reduction: str,
    wanted: Wanted,
) -> Result:
    """The loss and the wanted gradients by ``kernel``. Launches only: nothing is read back to the host."""
    x, y = x.contiguous(), y.contiguous()
    (M, D), N = x.shape, y.shape[0]
    dtype = accumulator_dtype(x.dtype)
    problem = Problem(M, N, D, x.dtype, x.device, wanted.dz)

    scale = _scalar(scale, dtype)
    bias = x.new_zeros((), dtype=dtype) if bias is None else _scalar(bias, dtype)
    pairs = pairs.prepared(x, y, dtype)
    dz_scale = _dz_scale(pairs, x) if wanted.dz and kernel.operand_dtype(problem) is torch.float16 else None

    dx, dy, sums = _block_loop(kernel, problem, x, y, scale, bias, pairs, wanted, dz_scale)

    totals = sums[0] if len(sums) == 1 else sums.sum(0)
    totals[3] = scale if dz_scale is None else scale / dz_scale
    scalars = torch.div(totals, _denominator(pairs, reduction, M, N), out=x.new_empty(4, dtype=dtype))
    return Result(scalars[0].clone(), scalars, dx, dy)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits, loss, scalar gradients and accumulators, for features of ``dtype``."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which the blocks' sums are added up: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def _block_loop(
    kernel: BlockKernel,
    problem: Problem,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: PairSpec,
    wanted: Wanted,
    dz_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, D] and dy [N, D], each empty if not wanted, and the blocks' sums [blocks, 4], the last column unused."""
    M, N, D = problem.M, problem.N, problem.D
    operand = kernel.operand_dtype(problem)
    R, C = kernel.block_shape(problem)
    R, C = min(R, M), min(C, N)
    blocks = list(_blocks(M, N, R, C))

    dx = torch.empty(M if wanted.dx else 0, D, dtype=scale.dtype, device=x.device)
    dy = torch.empty(N if wanted.dy else 0, D, dtype=scale.dtype, device=x.device)
    if not blocks:
        return dx.zero_(), dy.zero_(), x.new_zeros((1, 4), dtype=sum_dtype(x.device))

    row = -(-C // DZ_ROW_MULTIPLE) * DZ_ROW_MULTIPLE
    dz_buffer = torch.empty(R if wanted.dz else 0, row, dtype=operand, device=x.device)
    sums = torch.empty(len(blocks), 4, dtype=sum_dtype(x.device), device=x.device)
    workspace = kernel.workspace(problem, R, C)

    for index, (rows, cols) in enumerate(blocks):
        if cols.start == 0:
            x_block = _as(_rows(x, rows), operand)
        y_block = _as(_rows(y, cols), operand)
        shape = x_block.shape[0], y_block.shape[0]
        dz = None if not wanted.dz else dz_buffer if dz_buffer.shape == shape else dz_buffer[: shape[0], : shape[1]]
        kernel.block(
            x_block,
            y_block,
            scale,
            bias,
            pairs.block(rows, cols),
            sums=sums[index],
            dz=dz,
            dz_scale=dz_scale,
            workspace=workspace,
            loss_only=not wanted.any,
        )
        if dz is not None and wanted.dx:
            kernel.matmul_(_rows(dx, rows), dz, y_block, accumulate=cols.start > 0, workspace=workspace)
        if dz is not None and wanted.dy:
            kernel.matmul_(_rows(dy, cols), dz.T, x_block, accumulate=rows.start > 0, workspace=workspace)
    return dx, dy, sums


def _rows(t: Tensor, rows: slice) -> Tensor:
    """``t[rows]``; a view costs as much as a small product, and a small problem is one block."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _scalar(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[] of ``dtype``."""
    return _as(t if t.dim() == 0 else t.reshape(()), dtype)


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def _blocks(M: int, N: int, R: int, C: int) -> Iterator[tuple[slice, slice]]:
    """Row-major: a block of images meets every text before the next begins."""
    for row in range(0, M, max(R, 1)):
        for col in range(0, N, max(C, 1)):
            yield slice(row, min(row + R, M)), slice(col, min(col + C, N))


def _dz_scale(pairs: PairSpec, x: Tensor) -> Tensor:
    """[] a power of two that fits max(w)·dz_scale into float16."""
    exponent = torch.full((), FLOAT16_DZ_EXPONENT, dtype=torch.int32, device=x.device)
    for weights in (pairs.image_weights, pairs.text_weights):
        if weights is not None and weights.numel():
            exponent = exponent - torch.frexp(weights.amax()).exponent
    return torch.ldexp(torch.ones((), device=x.device), exponent.clamp(max=126))  # float32 ends at 2^127


def _denominator(pairs: PairSpec, reduction: str, M: int, N: int) -> float | Tensor:
    """Of the loss; a tensor where it depends on weights. 0 where nothing counts: the loss is then NaN, as a mean is."""
    images = M if pairs.image_weights is None else _total(pairs.image_weights)
    texts = N if pairs.text_weights is None else _total(pairs.text_weights)
    match reduction:
        case "sum":
            return 1.0
        case "batchmean":
            return images
        case "mean":
            return images * texts
    raise ValueError(f"reduction {reduction!r}")


def _total(weights: Tensor) -> Tensor:
    return weights.sum(dtype=sum_dtype(weights.device))
