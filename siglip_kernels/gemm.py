"""GEMMs of the device's library into a float32 (or float64) result; operands aligned for GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulates_in_float32(device: torch.device) -> bool:
    """Whether the device's library multiplies half-precision matrices into a float32 result. ROCm's was not tried."""
    return device.type == "cuda" and torch.version.hip is None


def allows_tf32() -> bool:
    """Whether the user lets float32 matrices be multiplied with TF32 operands."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def gemm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``: a [m, k] and b [k, n] of one dtype; out [m, n] of that dtype or float32."""
    if a.dtype is not out.dtype and accumulates_in_float32(out.device):
        if accumulate:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        return
    if a.dtype is not out.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def pad_to_alignment(t: Tensor) -> Tensor:
    """``t`` [rows, D], or a copy padded with zeros, as TMA and vector loads require: D and the row stride are multiples
    of 16 elements, and the base is aligned to 16 bytes. No kernel is compiled or tested for anything else."""
    if t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0:
        return t
    padded = t.new_empty(t.shape[0], -(-t.shape[1] // 16) * 16)
    padded[:, : t.shape[1]] = t
    padded[:, t.shape[1] :] = 0
    return padded
