"""GEMMs of the device's library into a float32 (or float64) result; operands aligned for GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from siglip_kernels.host_read import is_capturing, read

_found: dict[tuple[torch.dtype, torch.device], bool] = {}


def accumulates_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device's library multiplies half-precision matrices into a float32 result with float32 sums.

    It is tried once on each device: old devices and some builds for ROCm refuse, and so does torch for float16 while
    the user allows float16 sums.
    """
    if dtype is torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    found = _found.get((dtype, device))
    if found is None:
        if is_capturing(device):
            return torch.version.hip is None
        found = _found[dtype, device] = device.type == "cuda" and _multiplies_into_float32(dtype, device)
    return found


def _multiplies_into_float32(dtype: torch.dtype, device: torch.device) -> bool:
    a, b = (torch.ones(16, 16, dtype=dtype, device=device) for _ in range(2))
    a[:, 0] = 2048.0  # Σ is 2063, and twice that 4126: neither is a number of half precision
    out = torch.empty(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(a, b, out.dtype, out=out)
        torch.addmm(out, a, b, out.dtype, out=out)
    except (RuntimeError, NotImplementedError):
        return False
    return set(read(out.flatten())) == {4126.0}


def allows_tf32() -> bool:
    """Whether the user lets float32 matrices be multiplied with TF32 operands."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def gemm_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b``, or ``out += a @ b``: a [m, k] and b [k, n] of one dtype; out [m, n] of any."""
    if a.dtype is not out.dtype is torch.float32 and accumulates_in_float32(a.dtype, out.device):
        if accumulate:
            torch.addmm(out, a, b, out.dtype, out=out)
        else:
            torch.mm(a, b, out.dtype, out=out)
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
