"""Converts the float32 accumulators to the gradients that the caller gets, in the arguments' dtypes and shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels.backends import triton


class LossAndGrads(NamedTuple):
    loss: Tensor  # [] float32 or float64
    dx: Tensor  # [M, D]
    dy: Tensor  # [N, D]
    dscale: Tensor
    dbias: Tensor | None  # None without a bias
    stats: Tensor | None  # [8] in the layout of stats.py, with return_stats


CPU_CHUNK = 2**19  # elements of a gradient that are rounded at once


def scaled(accumulator: Tensor, factor: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """``factor * accumulator`` in ``dtype``, rounded once and without a temporary of the accumulator's dtype.

    ``overwrite``: the accumulator is not needed any more. It becomes the result if it already has ``dtype``.
    """
    if accumulator.dtype is dtype:
        # Nobody else holds a detached tensor, so autograd takes it as .grad. It would copy any other.
        return accumulator.mul_(factor).detach() if overwrite else accumulator * factor
    out = torch.empty_like(accumulator, dtype=dtype)
    if out.is_cpu:
        _round_in_chunks(accumulator, factor, out, overwrite)
    elif not (out.is_cuda and triton.scale_and_round(accumulator, factor, out)):
        torch.mul(accumulator, factor, out=out)
    return out


def may_reuse(accumulator: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``scaled`` gains from overwriting the accumulator."""
    return accumulator.dtype is dtype or accumulator.is_cpu


def _round_in_chunks(accumulator: Tensor, factor: Tensor, out: Tensor, overwrite: bool) -> None:
    """``scaled`` on the CPU, where rounding needs a temporary unless the accumulator may be overwritten."""
    rows = max(1, CPU_CHUNK // max(1, out.shape[1]))
    if len(out) <= rows:
        chunks = [(accumulator, out)]  # without views
    else:
        chunks = list(zip(accumulator.split(rows), out.split(rows), strict=True))
    for chunk, rounded in chunks:
        if overwrite:
            rounded.copy_(chunk.mul_(factor))
        else:
            torch.mul(chunk, factor, out=rounded)


def scaled_out_of_place(accumulator: Tensor, factor: Tensor, dtype: torch.dtype, _overwrite: bool) -> Tensor:
    """The same for any kind of tensor: it never writes to the accumulator, which may be traced or batched."""
    return (accumulator * factor).to(dtype)


def scaled_scalars(scalars: Tensor, factor: Tensor, is_plain: bool) -> tuple[Tensor, ...]:
    """``factor`` times dscale, dbias and grad_scale of ``scalars`` [4]: no gradient is a view of another.

    ``is_plain``: both are plain tensors, for which one kernel suffices.
    """
    if is_plain:
        return tuple(torch._foreach_mul(scalars.unbind()[1:], factor))
    _, dscale, dbias, grad_scale = (scalars * factor).unbind()
    return dscale.clone(), dbias.clone(), grad_scale


def copied(value: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A copy of the scalar in ``dtype`` and ``shape``."""
    return shaped(value.clone() if value.dtype is dtype else value, dtype, shape)


def shaped(value: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """The scalar in ``dtype`` and ``shape``; itself if it has them."""
    value = value if value.dtype is dtype else value.to(dtype)
    return value.reshape(shape) if shape else value
