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
    out = accumulator.new_empty(accumulator.shape, dtype=dtype)
    if out.is_cuda and triton.scale_and_round(accumulator, factor, out):
        return out
    # On the CPU rounding does need a temporary, so it works a chunk at a time.
    rows = max(1, CPU_CHUNK // max(1, out.shape[1]) if out.device.type == "cpu" else len(out))
    in_place = overwrite and out.device.type == "cpu"  # needs no temporary
    for chunk, rounded in zip(accumulator.split(rows), out.split(rows), strict=True):
        if in_place:
            rounded.copy_(chunk.mul_(factor))
        else:
            torch.mul(chunk, factor, out=rounded)
    return out


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
    copy = value.clone() if value.dtype is dtype else value.to(dtype)
    return copy.reshape(shape) if shape else copy
