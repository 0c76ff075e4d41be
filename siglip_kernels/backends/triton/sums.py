"""Ends a block: the sums of a kernel's parts in float64, and of a loss that is one block its value and scalars too."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.compiled import CompiledKernels

BLOCK, NUM_WARPS = 8192, 16  # many loads in flight: it waits for memory


@triton.jit(do_not_specialize=["parts", "images", "texts"])
def _sum_kernel(
    partials_ptr,  # [ROWS, parts] float32
    sums_ptr,  # [ROWS] float64, out
    loss_ptr,  # [] float32, out, or None
    scalars_ptr,  # [4] float32, out, or None: loss, dscale, dbias, grad_scale
    scale_ptr,  # [] float32
    dz_scale_ptr,  # [] float32 or None
    parts,
    images,  # the loss's denominator is images · texts
    texts,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, parts, BLOCK):
            mask = start + offsets < parts
            sums += tl.load(partials_ptr + row * parts + start + offsets, mask=mask, other=0.0).to(tl.float64)
        total = tl.sum(sums)
        tl.store(sums_ptr + row, total)
        if scalars_ptr is not None:
            value = (total / (images.to(tl.float64) * texts.to(tl.float64))).to(tl.float32)
            tl.store(scalars_ptr + row, value)
            if row == 0:
                tl.store(loss_ptr, value)
    if scalars_ptr is not None:
        grad_scale = tl.load(scale_ptr)
        if dz_scale_ptr is not None:
            grad_scale = tl.div_rn(grad_scale, tl.load(dz_scale_ptr))
        value = grad_scale.to(tl.float64) / (images.to(tl.float64) * texts.to(tl.float64))
        tl.store(scalars_ptr + 3, value.to(tl.float32))


_kernels = CompiledKernels(_sum_kernel)


def sum_partials(task: BlockTask, partials: Tensor) -> None:
    """Write ``task.sums`` and ``task.result`` from partials [3, parts], in a fixed order; see reduce_partials."""
    result, rows = task.result, 1 if task.loss_only else 3
    arguments = {
        "partials_ptr": partials,
        "sums_ptr": task.sums,
        "loss_ptr": None if result is None else result.loss,
        "scalars_ptr": None if result is None else result.scalars,
        "scale_ptr": task.scale,
        "dz_scale_ptr": task.dz_scale,
        "parts": partials.shape[1],
        "images": 1 if result is None else result.images,
        "texts": 1 if result is None else result.texts,
        "ROWS": rows,
        "BLOCK": BLOCK,
    }
    key = rows, result is None, task.dz_scale is None, partials.device
    unaligned = task.sums, task.scale, task.dz_scale
    _kernels.launch(key, rows if result is None else 1, arguments, {"num_warps": NUM_WARPS}, unaligned)
