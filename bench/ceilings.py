"""What the device can do at the very shapes of a block, and what the parts of a block take: where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.problems import Problem
from bench.timing import MIB, interleaved, peak_bytes, spread
from siglip_kernels import schedule
from siglip_kernels.backends.base import BlockKernel
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.products import matmul_
from siglip_kernels.schedule import Wanted
from siglip_kernels.testing import make_inputs

COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}


@dataclass(frozen=True)
class Rate:
    """One measured part. ``rate``: TFLOP/s of 2·R·C·D operations, for the copy TB/s of bytes read and written."""

    name: str
    shape: str
    ms: float
    ms_low: float
    ms_high: float
    rate: float


@dataclass(frozen=True)
class Bound:
    """Time and peak memory of the whole loss under one bound of the workspace."""

    dz_mib: float
    ms: float
    ms_low: float
    ms_high: float
    peak_mib: float | None


def copy_rate(device: torch.device, seconds: float) -> Rate:
    """Device memory read and written."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (times,) = _timed({"copy": partial(target.copy_, source)}, device, seconds).values()
    size = source.numel() * 4
    return _rate("copy", f"{size / MIB:,.0f} MiB", times, 2 * size)


def block_rates(kernel: BlockKernel, problem: Problem, device: torch.device, seconds: float) -> list[Rate]:
    """The library's three products at the shape of a block of ``problem``, and the block kernel beside them."""
    call = Call(problem.B, problem.B, problem.D, problem.dtype, device)
    R, C = (min(size, problem.B) for size in kernel.block_shape(call))
    x, y, scale, bias = make_inputs(R, C, problem.D, kernel.operand_dtype(call), device=device, drawn_on=device)
    z = x @ y.T
    dz = torch.sigmoid(z.float() * scale + bias).to(z.dtype)
    out = torch.empty_like(z)
    dx, dy = (torch.zeros(t.shape, device=device) for t in (x, y))
    sums = torch.empty(3, dtype=schedule.sum_dtype(device), device=device)
    pairs = PairSpec().prepared(x, y, torch.float32)
    block = partial(kernel.block, x, y, scale, bias, sums=sums, dz_scale=None)
    with_dz, without = (kernel.workspace(call._replace(needs_dz=needs), R, C) for needs in (True, False))
    elsewhere = PairSpec(positive_offset=None).prepared(x, y, torch.float32)
    steps: dict[Any, Callable[[], Any]] = {
        "x·yᵀ": partial(torch.mm, x, y.T, out=z),
        "dx += dz·y, float32": partial(matmul_, dx, dz, y, accumulate=True),
        "dy += dzᵀ·x, float32": partial(matmul_, dy, dz.T, x, accumulate=True),
        f"block ({kernel.name})": partial(block, pairs, dz=out, workspace=with_dz),
        f"block ({kernel.name}), no positives": partial(block, elsewhere, dz=out, workspace=with_dz),
        f"block ({kernel.name}), loss only": partial(block, pairs, dz=None, workspace=without, loss_only=True),
    }
    shape = f"{R} × {C} × {problem.D}"
    times = _timed(steps, device, seconds)
    return [_rate(name, shape, times[name], 2 * R * C * problem.D) for name in steps]


def workspace_curve(problem: Problem, device: torch.device, seconds: float, mib: tuple[float, ...]) -> list[Bound]:
    """Forward with every gradient by the Triton kernel, its dz bounded by each of ``mib``."""
    x, y, scale, bias = make_inputs(problem.B, problem.B, problem.D, problem.dtype, device=device, drawn_on=device)
    steps = {
        size: partial(
            schedule.run,
            TritonBlockKernel(dz_bytes=int(size * MIB)),
            *(x, y, scale, bias, PairSpec(), "batchmean", Wanted()),
        )
        for size in mib
    }
    peaks = {}
    for size, step in steps.items():
        step()
        taken = peak_bytes(step, device)
        peaks[size] = None if taken is None else taken / MIB
    times = _timed(steps, device, seconds)
    return [Bound(size, *spread([1000 * t for t in times[size]]), peaks[size]) for size in mib]


def _timed(steps: Mapping[Any, Callable[[], Any]], device: torch.device, seconds: float) -> dict[Any, list[float]]:
    for step in steps.values():
        step()
    return interleaved(steps, device, seconds)


def _rate(name: str, shape: str, times: list[float], work: float) -> Rate:
    ms = spread([1000 * t for t in times])
    return Rate(name, shape, *ms, rate=work / ms.median / 1e9)
