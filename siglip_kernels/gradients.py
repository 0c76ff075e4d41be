"""From the float32 accumulators to the gradients that the caller gets, in the arguments' dtypes and shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LossAndGrads(NamedTuple):
    loss: Tensor  # [] float32 or float64
    dx: Tensor  # [M, D]
    dy: Tensor  # [N, D]
    dscale: Tensor
    dbias: Tensor | None  # None without a bias
    stats: Tensor | None  # [8] as stats.py has it, where asked for


CPU_CHUNK = 2**19  # elements of a gradient that are rounded at once


def scaled(accumulator: Tensor, factor: Tensor, dtype: torch.dtype, overwrite: bool) -> Tensor:
    """``factor * accumulator`` in ``dtype``, rounded once and without a temporary of the accumulator's dtype.

    ``overwrite``: the accumulator is not needed any more, and becomes the result where it has its dtype.
    """
    if accumulator.dtype is dtype:
        # Detached, it is a tensor that nobody else holds: autograd takes it for .grad, where it would copy another.
        return accumulator.mul_(factor).detach() if overwrite else accumulator * factor
    out = accumulator.new_empty(accumulator.shape, dtype=dtype)
    # The CPU rounds by way of a temporary after all: a chunk at a time.
    rows = max(1, CPU_CHUNK // max(1, out.shape[1]) if out.device.type == "cpu" else len(out))
    in_place = overwrite and out.device.type == "cpu"  # without that temporary
    for chunk, rounded in zip(accumulator.split(rows), out.split(rows), strict=True):
        if in_place:
            rounded.copy_(chunk.mul_(factor))
        else:
            torch.mul(chunk, factor, out=rounded)
    return out


def scaled_out_of_place(accumulator: Tensor, factor: Tensor, dtype: torch.dtype, _overwrite: bool) -> Tensor:
    """The same for any kind of tensor: a traced or a batched one is not written to."""
    return (accumulator * factor).to(dtype)


def reshaped(value: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """A copy of the scalar, so that no gradient is a view of another."""
    copy = value.clone() if value.dtype is dtype else value.to(dtype)
    return copy.reshape(shape) if shape else copy
