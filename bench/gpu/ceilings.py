"""The device's ceilings: copy bandwidth, the library's GEMMs at the shapes of a block, and the block kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bench.harness.timing import MIB, peak_bytes, spread, time_interleaved
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Rate, WorkspaceBound
from siglip_kernels import schedule
from siglip_kernels.backends.base import BlockKernel, BlockTask
from siglip_kernels.backends.base import Problem as BackendProblem
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.gemm import gemm_
from siglip_kernels.pairs import PairSpec
from siglip_kernels.request import NeedsGrad, Request
from siglip_kernels.testing import make_inputs

COPY_BYTES = {"cuda": 2**32, "cpu": 2**26}


def copy_bandwidth(device: torch.device, seconds: float) -> Rate:
    """Bandwidth of a copy in device memory, bytes read plus bytes written."""
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    (times,) = _warm_up_and_time({"copy": partial(target.copy_, source)}, device, seconds).values()
    size = source.numel() * 4
    return _make_rate("copy", f"{size / MIB:,.0f} MiB", times, 2 * size)


def block_throughput(
    kernels: Mapping[str, BlockKernel],  # by the name to show
    problem: Problem,
    device: torch.device,
    seconds: float,
    pairs: PairSpec | None = None,  # None: the diagonal, and two variants of it
) -> list[Rate]:
    """The library's three GEMMs at the block shape of each kernel for ``problem``, timed in turns with the kernels."""
    call = problem.for_backend(device)
    steps: dict[tuple[str, str], Callable[[], Any]] = {}  # by name and shape
    operations: dict[tuple[str, str], int] = {}
    operands: dict[tuple[int, int, torch.dtype], _BlockOperands] = {}
    for name, kernel in kernels.items():
        R, C = problem.block_shape(kernel, device)
        key = R, C, kernel.operand_dtype(call)
        if key not in operands:
            operands[key] = _BlockOperands(*key, problem.D, device)
        block = operands[key]
        for title, step in {**block.library_gemms(), **block.kernel_variants(kernel, name, call, pairs)}.items():
            steps[title, block.shape] = step
            operations[title, block.shape] = 2 * R * C * problem.D
    times = _warm_up_and_time(steps, device, seconds) if steps else {}
    return [_make_rate(*key, times[key], operations[key]) for key in steps]


class _BlockOperands:
    """Operands and outputs of one block, with the steps to time on them."""

    def __init__(self, R: int, C: int, dtype: torch.dtype, D: int, device: torch.device) -> None:
        self.size, self.shape = (R, C), f"{R} × {C} × {D}"
        self.x, self.y, self.scale, self.bias = make_inputs(R, C, D, dtype, device=device, drawn_on=device)
        self.z = self.x @ self.y.T
        self.dz = torch.sigmoid(self.z.float() * self.scale + self.bias).to(self.z.dtype)
        self.out = torch.empty_like(self.z)
        self.dx, self.dy = (torch.zeros(t.shape, device=device) for t in (self.x, self.y))
        self.sums = torch.empty(3, dtype=schedule.sum_dtype(device), device=device)

    def library_gemms(self) -> dict[str, Callable[[], Any]]:
        return {
            "x·yᵀ": partial(torch.mm, self.x, self.y.T, out=self.z),
            "dx += dz·y, float32": partial(gemm_, self.dx, self.dz, self.y, accumulate=True),
            "dy += dzᵀ·x, float32": partial(gemm_, self.dy, self.dz.T, self.x, accumulate=True),
        }

    def kernel_variants(
        self, kernel: BlockKernel, name: str, call: BackendProblem, pairs: PairSpec | None
    ) -> dict[str, Callable[[], Any]]:
        """The block kernel with dz; on the diagonal also without positives, and with the loss alone."""
        with_dz, without = (kernel.workspace(call._replace(needs_dz=needs), *self.size) for needs in (True, False))

        def prepared(pairs: PairSpec) -> PairSpec:
            return pairs.prepared(self.x, self.y, torch.float32).block(*(slice(0, size) for size in self.size))

        task = BlockTask(
            x=self.x,
            y=self.y,
            scale=self.scale,
            bias=self.bias,
            pairs=prepared(PairSpec() if pairs is None else pairs),
            sums=self.sums,
            dz=self.out,
            dz_scale=None,
            workspace=with_dz,
        )
        variants: dict[str, Callable[[], Any]] = {f"block ({name})": partial(kernel.block, task)}
        if pairs is None:
            no_positives = task._replace(pairs=prepared(PairSpec(positive_offset=None)))
            loss_only = task._replace(dz=None, workspace=without, loss_only=True)
            variants[f"block ({name}), no positives"] = partial(kernel.block, no_positives)
            variants[f"block ({name}), loss only"] = partial(kernel.block, loss_only)
        return variants


def workspace_sweep(
    problem: Problem, device: torch.device, seconds: float, mib: tuple[float, ...]
) -> list[WorkspaceBound]:
    """Time and peak memory of the Triton kernel with every gradient, its dz limited to each of ``mib``."""
    inputs = make_inputs(problem.B, problem.B, problem.D, problem.dtype, device=device, drawn_on=device)
    request, needs_grad = Request(*inputs), NeedsGrad()
    call = schedule.problem_of(request, needs_grad)
    kernels = {size: TritonBlockKernel(dz_bytes=int(size * MIB)) for size in mib}
    steps = {size: partial(schedule.run, kernel, call, request, needs_grad) for size, kernel in kernels.items()}
    peaks = {}
    for size, step in steps.items():
        step()
        peak = peak_bytes(step, device)
        peaks[size] = None if peak is None else peak / MIB
    times = _warm_up_and_time(steps, device, seconds)
    return [WorkspaceBound(size, *spread([1000 * t for t in times[size]]), peaks[size]) for size in mib]


def _warm_up_and_time(
    steps: Mapping[Any, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[Any, list[float]]:
    for step in steps.values():
        step()
    return time_interleaved(steps, device, seconds)


def _make_rate(name: str, shape: str, times: list[float], operations: float) -> Rate:
    ms = spread([1000 * t for t in times])
    return Rate(name, shape, *ms, rate=operations / ms.median / 1e9)
