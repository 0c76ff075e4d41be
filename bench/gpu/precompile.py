"""Which Triton kernels a run will ask for, found by running its schedule on tensors without data; compiled ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu import checks
from bench.gpu.plan import Plan
from bench.microbenchmark.problems import FORWARD, FROZEN, FULL, Problem
from siglip_kernels import schedule
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.backends.triton.configs import Variant
from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import Wanted
from siglip_kernels.testing import PAIRS

MIB = 2**20
META = torch.device("meta")
WANTED = {FULL: Wanted(), FROZEN: Wanted(dx=False), FORWARD: Wanted(*(False,) * 4)}


class Ask(NamedTuple):
    """A call of the loss."""

    shape: tuple[int, int, int]  # M, N, D
    dtype: torch.dtype
    pairs: dict[str, Any]  # as sigmoid_loss takes them, without data
    wanted: Wanted = WANTED[FULL]


class Recorder(TritonBlockKernel):
    """Notes which compilation each block asks for, in place of running it."""

    def __init__(self, arch: str, **options: Any) -> None:
        super().__init__(**options)
        self.arch = arch
        self.variants: dict[Variant, None] = {}

    def step(self, x: torch.Tensor, y: torch.Tensor, *logits: Any, dz: torch.Tensor | None, **others: Any) -> None:
        from siglip_kernels.backends.triton.launch import variant_of

        loss_only, stats = others.get("loss_only", False), others.get("stats")
        _, _, pairs = logits
        found = variant_of(self.arch, x, y, pairs, dz is not None, loss_only, stats is not None, self.config)
        self.variants[found] = None


def variants(arch: str, asks: Iterable[Ask], **options: Any) -> list[Variant]:
    """Those that ``asks`` need on ``arch``, in their order; ``options``: of TritonBlockKernel."""
    recorder = Recorder(arch, **options)
    for (M, N, D), dtype, pairs, wanted in asks:
        x, y = (torch.empty(rows, D, dtype=dtype, device=META) for rows in (M, N))
        scalar = torch.empty((), device=META)
        labels = PairSpec(**{name: value for name, value in pairs.items() if name != "reduction"})
        schedule.run(recorder, x, y, scalar, scalar, labels, "sum", wanted)
    return list(recorder.variants)


def by_checks(plan: Plan, dtype: torch.dtype) -> Iterator[Ask]:
    """What gpu.py's checks of one dtype call."""
    for shape in (*plan.checked, checks.SMALL_SHAPE):
        for pairs in _every_pairs(shape):
            yield Ask(shape, dtype, pairs)
    for pairs in _every_pairs(plan.checked[1]):
        yield Ask(plan.checked[1], dtype, pairs, Wanted(stats=True))
    yield Ask((plan.many_pairs, plan.many_pairs, checks.MANY_PAIRS_D), dtype, {})
    yield Ask(checks.SHAPE, dtype, {"positive_offset": 3})


def by_timings(plan: Plan) -> Iterator[Ask]:
    """What gpu.py's steps with a clock call."""
    for problem in (*plan.compared, plan.largest):
        yield of(problem)
    for problem in plan.blocks:
        shape = *problem.block(TritonBlockKernel(), META), problem.D
        for offset, wanted in ((0, FULL), (None, FULL), (0, FORWARD)):
            yield Ask(shape, problem.dtype, {"positive_offset": offset}, WANTED[wanted])


def of(problem: Problem) -> Ask:
    return Ask((problem.B, problem.B, problem.D), problem.dtype, {}, WANTED[problem.mode])


def by_plan(arch: str, plan: Plan, dtypes: Iterable[torch.dtype]) -> list[Variant]:
    """All that ``python -m bench gpu`` needs: what is checked and timed first, first."""
    first, *others = dtypes
    found = variants(arch, by_checks(plan, first)) + variants(arch, by_timings(plan))
    for size in plan.workspaces:
        found += variants(arch, [of(plan.blocks[0])], dz_bytes=int(size * MIB))
    for dtype in others:
        found += variants(arch, by_checks(plan, dtype))
    return list(dict.fromkeys(found))


def _every_pairs(shape: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    for make in PAIRS.values():
        yield make(*shape[:2], META)
