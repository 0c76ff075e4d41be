"""Proof that the gradient check can fail: each mutation of a block kernel or of the schedule makes it fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels import Teacher, backends, gemm, pairs, schedule, sigmoid_loss
from siglip_kernels.backends import eager
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.eager import _Parts as Parts
from siglip_kernels.pairs import ANCHORS, PairSpec
from siglip_kernels.teachers import TeacherLogits, total_weight
from siglip_kernels.testing import REGIMES, Report, check

# (M, N, D): several of the small blocks below a side, ragged in M, N and D.
SHAPE = (300, 420, 40)
BLOCK = (128, 160)


class Kernel(EagerBlockKernel):
    """The eager kernel on blocks small enough that SHAPE has several a side; mutants change one thing."""

    def block_shape(self, problem: Any) -> tuple[int, int]:
        return BLOCK


class NegativesDropped(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task)
        task.sums.zero_()
        if task.dz is not None:
            task.dz.mul_(task.pairs.positive_mask(*task.dz.shape, task.x.device))


class DiagonalOffByOne(Kernel):
    def block(self, task: BlockTask) -> None:
        offset = task.pairs.positive_offset
        moved = task.pairs._replace(positive_offset=None if offset is None else offset + 1)
        super().block(task._replace(pairs=moved))


class LastRaggedTileSkipped(Kernel):
    def block(self, task: BlockTask) -> None:
        whole = task.x.shape[0] // 16 * 16
        rows, cols = slice(0, whole), slice(0, task.y.shape[0])
        dz, teacher = task.dz, task.teacher
        if dz is not None:
            dz.zero_()
            dz = dz[:whole]
        if teacher is not None:
            teacher = teacher._replace(products=teacher.products[:whole])
        super().block(task._replace(x=task.x[:whole], pairs=task.pairs.block(rows, cols), dz=dz, teacher=teacher))


class WeightIgnored(Kernel):
    def block(self, task: BlockTask) -> None:
        pairs = task.pairs
        unweighted = PairSpec(pairs.positive_offset, pairs.image_ids, pairs.text_ids, pairs.image_weights)
        super().block(task._replace(pairs=unweighted))


class IdsIgnored(Kernel):
    def block(self, task: BlockTask) -> None:
        pairs = task.pairs
        weights = pairs.image_weights, pairs.text_weights
        super().block(task._replace(pairs=PairSpec(pairs.positive_offset, None, None, *weights)))


class Zeros(Kernel):
    def block(self, task: BlockTask) -> None:
        task.sums.zero_()
        if task.dz is not None:
            task.dz.zero_()


class ZeroGradients(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.dz is not None:
            task.dz.zero_()


class NothingWritten(Kernel):
    def block(self, task: BlockTask) -> None:
        pass


class BiasIgnored(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task._replace(bias=torch.zeros_like(task.bias)))


class NaiveSoftplus(Kernel):
    """log(1 + e) instead of log1p(e)."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if not task.pairs.has_weights:
            z = task.scale * (task.x @ task.y.T) + task.bias
            z = torch.where(task.pairs.positive_mask(*z.shape, z.device), -z, z)
            task.sums[0] = (z.clamp(min=0) + torch.log(1 + torch.exp(-z.abs()))).sum()


class OneImageMass(Kernel):
    """k of the images is taken for 1."""

    def block(self, task: BlockTask) -> None:
        pairs = task.pairs
        if pairs.image_masses is not None:
            pairs = pairs._replace(image_masses=torch.full_like(pairs.image_masses, ANCHORS[pairs.anchors][0]))
        super().block(task._replace(pairs=pairs))


class TextMassDropped(Kernel):
    def block(self, task: BlockTask) -> None:
        pairs = task.pairs
        if pairs.text_masses is not None:
            pairs = pairs._replace(text_masses=torch.zeros_like(pairs.text_masses))
        super().block(task._replace(pairs=pairs))


class TargetsAreWeights(Kernel):
    def block(self, task: BlockTask) -> None:
        kind = task.pairs.multi_positive and "weights"
        super().block(task._replace(pairs=task.pairs._replace(multi_positive=kind)))


class PositiveWeightIgnored(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task._replace(pairs=task.pairs._replace(positive_weight=1.0)))


class SmoothingIgnored(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task._replace(pairs=task.pairs._replace(label_smoothing=0.0)))


class _WeighsNegatives(Parts):
    """positive_weight weighs the wrong part of every term."""

    def __init__(self, pairs: PairSpec, a: Tensor, positives: eager._Positives, teacher: TeacherLogits | None) -> None:
        super().__init__(pairs._replace(positive_weight=1.0), a, positives, teacher)
        positive = pairs.positive_mask(a.shape[0], a.shape[1], a.device)
        self.f = torch.where(positive, self.f, pairs.positive_weight * self.f)
        if self.g is not None:
            self.g = torch.where(positive, pairs.positive_weight * self.g, self.g)


class _SmoothsPositivesOnly(Parts):
    def __init__(self, pairs: PairSpec, a: Tensor, positives: eager._Positives, teacher: TeacherLogits | None) -> None:
        super().__init__(pairs, a, positives, teacher)
        positive = pairs.positive_mask(a.shape[0], a.shape[1], a.device)
        self.f = torch.where(positive, self.f, 1.0)
        if self.g is not None:
            self.g = torch.where(positive, self.g, 0.0)


class _TeachesPositivesOnly(Parts):
    def __init__(self, pairs: PairSpec, a: Tensor, positives: eager._Positives, teacher: TeacherLogits | None) -> None:
        super().__init__(pairs, a, positives, teacher)
        untaught = Parts(pairs._replace(teachers=()), a, positives, None)
        positive = pairs.positive_mask(a.shape[0], a.shape[1], a.device)
        self.f = torch.where(positive, self.f, untaught.f)
        if self.g is not None:
            self.g = torch.where(positive, self.g, 0.0 if untaught.g is None else untaught.g)


class ChangedTeacher(Kernel):
    """The kernel sees other logits of the teachers, or another weight; or, with None, no teacher."""

    def __init__(self, change: Callable[[TeacherLogits], TeacherLogits] | None) -> None:
        self.change = change

    def block(self, task: BlockTask) -> None:
        if self.change is None:
            task = task._replace(pairs=task.pairs._replace(teachers=()), teacher=None)
        elif task.teacher is not None:
            task = task._replace(teacher=self.change(task.teacher))
        super().block(task)


class IgnoredPairsAreNegative(Kernel):
    def block(self, task: BlockTask) -> None:
        if task.pairs.ignore_ids:
            task = task._replace(pairs=PairSpec(task.pairs.positive_offset))
        super().block(task)


class IgnoredPairsArePositive(Kernel):
    def block(self, task: BlockTask) -> None:
        super().block(task._replace(pairs=task.pairs._replace(ignore_ids=False)))


class DiagonalIgnoredToo(Kernel):
    def block(self, task: BlockTask) -> None:
        offset = None if task.pairs.ignore_ids else task.pairs.positive_offset
        super().block(task._replace(pairs=task.pairs._replace(positive_offset=offset)))


def run_check(monkeypatch: pytest.MonkeyPatch, kernel: EagerBlockKernel, **selection: Any) -> Report:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel)
    # One pair alone shows what many pairs average out.
    chosen = {"dtypes": [torch.float32], "shapes": [SHAPE, (1, 1, 8)], **selection}
    return check(partial(sigmoid_loss, backend="eager"), **chosen)


def test_the_unmutated_kernel_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_check(monkeypatch, Kernel(), dtypes=[torch.float32, torch.bfloat16])
    assert report.ok, report


KERNEL_MUTANTS = [
    NegativesDropped,
    DiagonalOffByOne,
    LastRaggedTileSkipped,
    WeightIgnored,
    IdsIgnored,
    Zeros,
    ZeroGradients,
    NothingWritten,
    BiasIgnored,
    NaiveSoftplus,
    OneImageMass,
    TextMassDropped,
    TargetsAreWeights,
    PositiveWeightIgnored,
    SmoothingIgnored,
    IgnoredPairsAreNegative,
    IgnoredPairsArePositive,
    DiagonalIgnoredToo,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutant", KERNEL_MUTANTS)
def test_a_mutated_kernel_fails(
    monkeypatch: pytest.MonkeyPatch, mutant: type[EagerBlockKernel], dtype: torch.dtype
) -> None:
    report = run_check(monkeypatch, mutant(), dtypes=[dtype])
    assert report.failures, f"{mutant.__name__} goes unnoticed in {dtype}"


def failed_pairs(report: Report) -> set[str]:
    return {verdict.case.pairs for verdict in report.verdicts if verdict.failures}


BALANCED, TAUGHT, BOTH = {"balance", "soft targets, balance"}, {"teacher"}, {"teachers, soft targets, balance"}
PARTS = [
    (_WeighsNegatives, BALANCED | BOTH),
    (_SmoothsPositivesOnly, BALANCED | TAUGHT | BOTH),
    (_TeachesPositivesOnly, TAUGHT | BOTH),
]


@pytest.mark.parametrize(("mutant", "fails"), PARTS)
def test_mutated_parts_fail(monkeypatch: pytest.MonkeyPatch, mutant: type[Parts], fails: set[str]) -> None:
    monkeypatch.setattr(eager, "_Parts", mutant)
    assert failed_pairs(run_check(monkeypatch, Kernel())) == fails


TEACHERS: dict[str, tuple[Callable[[TeacherLogits], TeacherLogits] | None, set[str]]] = {
    "ignored": (None, TAUGHT | BOTH),
    "its weight and the labels' change places": (lambda t: t._replace(weight=1 - t.weight), TAUGHT | BOTH),
    "of the wrong sign": (lambda t: t._replace(scale=-t.scale, bias=-t.bias), TAUGHT | BOTH),
    "of other texts": (lambda t: t._replace(products=t.products.roll(1, 1)), TAUGHT | BOTH),
    # Of several teachers the kernel gets the logits whole.
    "without its scale": (lambda t: t._replace(scale=torch.ones_like(t.scale)), TAUGHT),
    "without its bias": (lambda t: t._replace(bias=torch.zeros_like(t.bias)), TAUGHT),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutation", TEACHERS)
def test_a_mutated_teacher_fails_in_every_regime(
    monkeypatch: pytest.MonkeyPatch, mutation: str, dtype: torch.dtype
) -> None:
    change, fails = TEACHERS[mutation]
    for regime in REGIMES:
        report = run_check(monkeypatch, ChangedTeacher(change), regimes=[regime], shapes=[SHAPE], dtypes=[dtype])
        assert failed_pairs(report) == fails, regime


def test_several_teachers_are_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first with the weight of all; and the mean of their logits in place of that of their sigmoids."""
    original = schedule.teacher_logits

    def first_alone(teachers: Any, *arguments: Any) -> TeacherLogits:
        return original(teachers[:1], *arguments)._replace(weight=total_weight(teachers))

    def mean_of_logits(teachers: Any, products: Tensor, inner_products: Any) -> TeacherLogits:
        logits = 0.0
        for teacher in teachers:
            found = original([teacher], products, inner_products)
            logits = logits + teacher.weight * (found.products * found.scale + found.bias)
        total = total_weight(teachers)
        return TeacherLogits(logits / total, torch.ones_like(found.scale), torch.zeros_like(found.bias), total)

    for mutated in (first_alone, mean_of_logits):
        with monkeypatch.context() as patch:
            patch.setattr(schedule, "teacher_logits", mutated)
            assert failed_pairs(run_check(patch, Kernel(), shapes=[SHAPE])) == BOTH, mutated.__name__


def test_dropped_negatives_fail_at_the_start_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the positives hide them from an absolute tolerance, and from the feature gradients in bfloat16."""
    report = run_check(monkeypatch, NegativesDropped(), regimes=["init"], pairs=["diagonal"], dtypes=[torch.bfloat16])
    assert report.failures


def last_block_skipped(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *shape: list(original(*shape))[:-1]


def products_overwrite(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda out, a, b, accumulate=False: original(out, a, b)


def products_always_accumulate(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda out, a, b, accumulate=False: original(out, a, b, accumulate=True)


def denominator_of_the_texts(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda reduction, images, texts: original(reduction, texts, images)


def products_rounded_to_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def gemm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        original(out, a, b, accumulate=accumulate)
        out.copy_(out.bfloat16())

    return gemm_


def padding_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ids, weights: original(ids, None)


def one_is_missing(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ids, among: original(ids, among) - 1


MUTATIONS = [
    (pairs, "ids_and_validity", padding_counts),
    (pairs, "count_equal", one_is_missing),
    (schedule, "_blocks", last_block_skipped),
    (gemm, "gemm_", products_overwrite),
    (gemm, "gemm_", products_always_accumulate),
    (gemm, "gemm_", products_rounded_to_bfloat16),
    (schedule, "denominator", denominator_of_the_texts),
    (eager, "gemm_", products_rounded_to_bfloat16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "name", "mutate"), MUTATIONS, ids=[f"{m.__name__}.{f.__name__}" for m, _, f in MUTATIONS]
)
def test_a_mutated_schedule_or_product_fails(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    mutate: Callable[[Any], Callable[..., Any]],
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(module, name, mutate(getattr(module, name)))
    assert run_check(monkeypatch, Kernel(), dtypes=[dtype]).failures, f"{mutate.__name__} goes unnoticed in {dtype}"


def test_a_mutated_block_corner_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and weights must be numbered from the block's own corner."""
    monkeypatch.setattr(PairSpec, "block", lambda self, rows, cols: self)
    with pytest.raises(RuntimeError):  # the weights of all images do not fit one block
        run_check(monkeypatch, Kernel(), pairs=["weights"])
    assert run_check(monkeypatch, Kernel(), pairs=["diagonal", "offset"]).failures


def test_a_teacher_of_the_first_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features must be the block's own."""
    original = Teacher.rows
    monkeypatch.setattr(
        Teacher, "rows", lambda self, images, texts: original(self, slice(0, images.stop - images.start), texts)
    )
    assert failed_pairs(run_check(monkeypatch, Kernel(), shapes=[SHAPE])) == TAUGHT | BOTH


def test_an_empty_report_is_not_ok() -> None:
    assert not Report().ok
