"""Finds the Triton kernels that a run will launch by running its schedule on meta tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu import checks
from bench.gpu.plan import Plan
from bench.harness.timing import MIB
from bench.microbenchmark.problems import FORWARD, FROZEN, FULL, Problem
from siglip_kernels import schedule
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.backends.triton.configs import Variant
from siglip_kernels.reference import pair_spec
from siglip_kernels.request import NO_GRAD, NeedsGrad, Request
from siglip_kernels.testing import PAIRS

META = torch.device("meta")
NEEDS_GRAD = {FULL: NeedsGrad(), FROZEN: NeedsGrad(x=False), FORWARD: NO_GRAD}


class LossCall(NamedTuple):
    """The arguments of one call of the loss that decide which kernels it launches."""

    shape: tuple[int, int, int]  # M, N, D
    dtype: torch.dtype
    pairs: dict[str, Any]  # arguments of sigmoid_loss, meta tensors
    needs_grad: NeedsGrad = NEEDS_GRAD[FULL]
    return_stats: bool = False


class VariantRecorder(TritonBlockKernel):
    """Records the kernel variant of each block instead of launching it."""

    def __init__(self, arch: str, **options: Any) -> None:
        super().__init__(**options)
        self.arch = arch
        self.variants: dict[Variant, None] = {}

    def block_and_grads(self, task: BlockTask) -> None:
        from siglip_kernels.backends.triton.launch import variant_of

        self.variants[variant_of(self.arch, task, self.config)] = None


def variants_of_calls(arch: str, calls: Iterable[LossCall], **options: Any) -> list[Variant]:
    """The variants that ``calls`` launch on ``arch``, in order; ``options``: of TritonBlockKernel."""
    recorder = VariantRecorder(arch, **options)
    for call in calls:
        M, N, D = call.shape
        x, y = (torch.empty(rows, D, dtype=call.dtype, device=META) for rows in (M, N))
        scalar = torch.empty((), device=META)
        pairs = pair_spec(**{name: value for name, value in call.pairs.items() if name != "reduction"})
        request = Request(x, y, scalar, scalar, pairs, "sum", return_stats=call.return_stats)
        schedule.run(recorder, schedule.problem_of(request, call.needs_grad), request, call.needs_grad)
    return list(recorder.variants)


def calls_of_checks(plan: Plan, dtype: torch.dtype) -> Iterator[LossCall]:
    """The calls of the checks of ``bench gpu`` in one dtype."""
    for shape in (*plan.check_shapes, checks.SMALL_SHAPE):
        for pairs in _every_pairs(shape):
            yield LossCall(shape, dtype, pairs)
    for pairs in _every_pairs(plan.check_shapes[1]):
        yield LossCall(plan.check_shapes[1], dtype, pairs, return_stats=True)
    yield LossCall((plan.overflow_batch, plan.overflow_batch, checks.OVERFLOW_D), dtype, {})
    yield LossCall(checks.SHAPE, dtype, {"positive_offset": 3})


def calls_of_timings(plan: Plan) -> Iterator[LossCall]:
    """The calls of the timed steps of ``bench gpu``."""
    for problem in (*plan.compared_problems, plan.largest_problem):
        yield loss_call(problem)
    for problem in plan.block_problems:
        shape = *problem.block_shape(TritonBlockKernel(), META), problem.D
        for offset, mode in ((0, FULL), (None, FULL), (0, FORWARD)):
            yield LossCall(shape, problem.dtype, {"positive_offset": offset}, NEEDS_GRAD[mode])


def loss_call(problem: Problem) -> LossCall:
    return LossCall((problem.B, problem.B, problem.D), problem.dtype, {}, NEEDS_GRAD[problem.mode])


def variants_of_plan(arch: str, plan: Plan, dtypes: Iterable[torch.dtype]) -> list[Variant]:
    """The variants that ``python -m bench gpu`` launches, in the order in which it checks and times them."""
    first, *others = dtypes
    found = variants_of_calls(arch, calls_of_checks(plan, first)) + variants_of_calls(arch, calls_of_timings(plan))
    for size in plan.workspace_mib:
        found += variants_of_calls(arch, [loss_call(plan.block_problems[0])], dz_bytes=int(size * MIB))
    for dtype in others:
        found += variants_of_calls(arch, calls_of_checks(plan, dtype))
    return list(dict.fromkeys(found))


def _every_pairs(shape: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    for make in PAIRS.values():
        yield make(*shape[:2], META)
