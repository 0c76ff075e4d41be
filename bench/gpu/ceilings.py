"""What the device can do at the very shapes of a block, and what the parts of a block take: where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bench.harness.timing import MIB, interleaved, peak_bytes, spread
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Bound, Rate
from siglip_kernels import schedule
from siglip_kernels.backends.base import BlockKernel
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.products import matmul_
from siglip_kernels.schedule import Wanted
from siglip_kernels.testing import make_inputs

COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}


def copy_rate(device: torch.device, seconds: float) -> Rate:
    """Device memory read and written."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (times,) = _timed({"copy": partial(target.copy_, source)}, device, seconds).values()
    size = source.numel() * 4
    return _rate("copy", f"{size / MIB:,.0f} MiB", times, 2 * size)


def block_rates(
    kernels: Mapping[str, BlockKernel],  # by the name to show
    problem: Problem,
    device: torch.device,
    seconds: float,
    pairs: PairSpec | None = None,  # of the texts of B images; None: the diagonal, and two other forms beside it
) -> list[Rate]:
    """The library's three products at the shape of each kernel's block of ``problem``, the kernels beside them."""
    call = problem.call(device)
    steps: dict[tuple[str, str], Callable[[], Any]] = {}  # by name and shape
    work: dict[tuple[str, str], int] = {}
    data: dict[tuple[int, int, torch.dtype], _Block] = {}
    for name, kernel in kernels.items():
        R, C = problem.block(kernel, device)
        key = R, C, kernel.operand_dtype(call)
        if key not in data:
            data[key] = _Block(*key, problem.D, device)
        block = data[key]
        for title, step in {**block.products(), **block.forms(kernel, name, call, pairs)}.items():
            steps[title, block.shape] = step
            work[title, block.shape] = 2 * R * C * problem.D
    times = _timed(steps, device, seconds) if steps else {}
    return [_rate(*key, times[key], work[key]) for key in steps]


class _Block:
    """The operands and the outputs of one block, and what can be done with them."""

    def __init__(self, R: int, C: int, dtype: torch.dtype, D: int, device: torch.device) -> None:
        self.size, self.shape = (R, C), f"{R} × {C} × {D}"
        self.x, self.y, self.scale, self.bias = make_inputs(R, C, D, dtype, device=device, drawn_on=device)
        self.z = self.x @ self.y.T
        self.dz = torch.sigmoid(self.z.float() * self.scale + self.bias).to(self.z.dtype)
        self.out = torch.empty_like(self.z)
        self.dx, self.dy = (torch.zeros(t.shape, device=device) for t in (self.x, self.y))
        self.sums = torch.empty(3, dtype=schedule.sum_dtype(device), device=device)

    def products(self) -> dict[str, Callable[[], Any]]:
        return {
            "x·yᵀ": partial(torch.mm, self.x, self.y.T, out=self.z),
            "dx += dz·y, float32": partial(matmul_, self.dx, self.dz, self.y, accumulate=True),
            "dy += dzᵀ·x, float32": partial(matmul_, self.dy, self.dz.T, self.x, accumulate=True),
        }

    def forms(self, kernel: BlockKernel, name: str, call: Call, pairs: PairSpec | None) -> dict[str, Callable[[], Any]]:
        """The block kernel with dz; for the diagonal also without positives, and for the loss alone."""
        block = partial(kernel.block, self.x, self.y, self.scale, self.bias, sums=self.sums, dz_scale=None)
        with_dz, without = (kernel.workspace(call._replace(needs_dz=needs), *self.size) for needs in (True, False))

        def prepared(pairs: PairSpec) -> PairSpec:
            return pairs.prepared(self.x, self.y, torch.float32).block(*(slice(0, size) for size in self.size))

        if pairs is not None:
            return {f"block ({name})": partial(block, prepared(pairs), dz=self.out, workspace=with_dz)}
        diagonal, elsewhere = prepared(PairSpec()), prepared(PairSpec(positive_offset=None))
        return {
            f"block ({name})": partial(block, diagonal, dz=self.out, workspace=with_dz),
            f"block ({name}), no positives": partial(block, elsewhere, dz=self.out, workspace=with_dz),
            f"block ({name}), loss only": partial(block, diagonal, dz=None, workspace=without, loss_only=True),
        }


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
