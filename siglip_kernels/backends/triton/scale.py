"""Scales and rounds a large gradient in one pass: torch's kernel for operands of two dtypes reads element by element.

Measured on an H200: 25 million elements in 41 µs, torch.mul 99; 3 million in 9 µs, torch.mul 17.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.backends.compiled import CompiledKernels
from siglip_kernels.host_read import is_capturing, read

BLOCK = 2048
COMPARED = 2**16  # elements at each end, at the first run

_works: dict[tuple[torch.dtype, torch.device], bool] = {}


@triton.jit(do_not_specialize=["elements"])
def _scale_kernel(accumulator_ptr, factor_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    factor = tl.load(factor_ptr)
    # Without a mask: one of an unknown length takes wide loads and stores apart, 107 µs in place of 41.
    if start + BLOCK <= elements:
        tl.store(out_ptr + offsets, (tl.load(accumulator_ptr + offsets) * factor).to(out_ptr.dtype.element_ty))
    else:
        mask = offsets < elements
        scaled = tl.load(accumulator_ptr + offsets, mask=mask) * factor
        tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=mask)


_kernels = CompiledKernels(_scale_kernel)


def scale_and_round(accumulator: Tensor, factor: Tensor, out: Tensor) -> bool:
    """``out = factor * accumulator``, rounded: contiguous, of float32, and a factor [] float32.

    False if it was not done: the kernel does not run on this device, as was found at its first run, or that cannot be
    found out now.
    """
    key = out.dtype, out.device
    if key not in _works:
        if is_capturing(out.device):
            return False
        _works[key] = _agrees_with_torch(accumulator, factor, out)
        return _works[key]
    if _works[key]:
        launch(accumulator, factor, out)
    return _works[key]


def launch(accumulator: Tensor, factor: Tensor, out: Tensor) -> None:
    elements = out.numel()
    arguments = {
        "accumulator_ptr": accumulator,
        "factor_ptr": factor,
        "out_ptr": out,
        "elements": elements,
        "BLOCK": BLOCK,
    }
    key = out.dtype, out.device, elements < 2**31
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        _kernels.launch(key, triton.cdiv(elements, BLOCK), arguments, {}, (accumulator, factor, out))


def _agrees_with_torch(accumulator: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Whether both ends of ``out`` have the same bits, after a launch."""
    out.fill_(torch.nan)
    try:
        launch(accumulator, factor, out)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # from Triton, a compiler, the driver; torch.mul does the same, only slower
        return False
    same = []
    for end in slice(0, COMPARED), slice(-COMPARED, None):
        expected = accumulator.flatten()[end] * factor
        same.append(((out.flatten()[end] == expected.to(out.dtype)) | expected.isnan()).all())
    return all(read(torch.stack(same)))
