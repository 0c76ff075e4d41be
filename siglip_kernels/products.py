"""The library's matrix products into a float32 (or float64) result."""

from __future__ import annotations

import torch
from torch import Tensor


def products_accumulate_in_float32(device: torch.device) -> bool:
    """Whether the device's library multiplies half-precision matrices into a float32 result."""
    return device.type == "cuda"


def matmul_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``: a [m, k], b [k, n] of one dtype, out [m, n] of that dtype or float32."""
    same_dtype = a.dtype is out.dtype
    if accumulate:
        torch.addmm(out, a, b, out=out) if same_dtype else torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.mm(a, b, out=out) if same_dtype else torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
