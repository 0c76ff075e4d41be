"""Teachers: against torch's own cross-entropy with dense targets, where nothing is left of dz, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import Teacher, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.loss import Backend
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.terms import cancellation
from siglip_kernels.testing import HALF, REGIMES, Inputs, differentiate, gold, limits, make_inputs, relative_l2
from tests.bench.gpu.faulty import needs_interpreter

M, N, D = 40, 70, 24
BACKENDS = ("eager", "cpu", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def teacher_of(width: int, weight: float, dtype: torch.dtype = torch.float64, **changes: Any) -> Teacher:
    return Teacher(*make_inputs(M, N, width, dtype, "trained", seed=width), weight)._replace(**changes)


def sigmoid_of(teacher: Teacher) -> Tensor:
    x, y = teacher.image_features.double(), teacher.text_features.double()
    z = float(teacher.logit_scale) * x @ y.T + float(teacher.logit_bias or 0.0)
    return z.sigmoid()


def written_out(inputs: list[Tensor], labels: Tensor, teachers: list[Teacher], p: float, **how: Tensor) -> Tensor:
    """Σ of torch's binary cross-entropy with the dense targets."""
    x, y, t, b = inputs
    target = (1 - sum(teacher.weight for teacher in teachers)) * labels
    target = target + sum(teacher.weight * sigmoid_of(teacher) for teacher in teachers)
    pos_weight = torch.tensor(p, dtype=torch.float64)
    return F.binary_cross_entropy_with_logits(t * x @ y.T + b, target, pos_weight=pos_weight, reduction="sum", **how)


TEACHERS = {
    "one": [teacher_of(17, 0.6)],
    "no label counts": [teacher_of(17, 1.0)],
    "without a bias": [teacher_of(17, 0.6, logit_bias=None)],
    "numbers": [teacher_of(17, 0.6, logit_scale=20.0, logit_bias=-3.0)],
    "several": [teacher_of(17, 0.3), teacher_of(40, 0.5), teacher_of(8, 0.1)],
    "float32": [teacher_of(17, 0.6, torch.float32)],
    "bfloat16": [teacher_of(17, 0.6, torch.bfloat16)],
    "float16 and float32": [teacher_of(16, 0.3, torch.float16), teacher_of(17, 0.3, torch.float32)],
}


def call(backend: str, inputs: list[Tensor], **arguments: Any) -> Tensor:
    if backend == "triton":
        needs_interpreter()
        inputs = [t.float() for t in inputs]
    return sigmoid_loss(*inputs, **arguments, reduction="sum", backend=cast(Backend, backend))


def assert_same(backend: str, inputs: list[Tensor], right: Tensor, **arguments: Any) -> None:
    ours = call(backend, inputs, **arguments)
    found = ours, *torch.autograd.grad(ours, inputs)
    expected = right, *torch.autograd.grad(right, inputs)
    limit = 2e-5 if backend == "triton" else 1e-12
    errors = [relative_l2(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= limit, errors


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_torch(backend: str, kind: str) -> None:
    teachers = TEACHERS[kind]
    inputs = [t.requires_grad_() for t in make_inputs(M, N, D, torch.float64, "trained")]
    labels = torch.eye(M, N, dtype=torch.float64)
    right = written_out(inputs, labels, teachers, 1.0)
    assert_same(backend, inputs, right, teacher=teachers if len(teachers) > 1 else teachers[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_everything_else(backend: str) -> None:
    """Ids, pairs that are left out, weights of which some are 0, a positive_weight, smoothing, an offset."""
    inputs = [t.requires_grad_() for t in make_inputs(M, N, D, torch.float64, "trained", positive_offset=3)]
    images, texts = torch.arange(M) % 9, torch.arange(N) % 11
    u, v = (torch.arange(M) % 4).double(), (torch.arange(N) % 3).double()
    positive = torch.zeros(M, N, dtype=torch.bool)
    positive.diagonal(3).fill_(True)
    kept = positive | (images[:, None] != texts)
    labels = 0.1 + 0.8 * positive.double()
    right = written_out(inputs, labels, TEACHERS["several"], 2.5, weight=u[:, None] * v * kept)
    arguments: dict[str, Any] = {"positive_offset": 3, "image_ids": images, "text_ids": texts, "ignore_ids": True}
    arguments |= {"image_weights": u, "text_weights": v, "positive_weight": 2.5, "label_smoothing": 0.1}
    assert_same(backend, inputs, right, teacher=TEACHERS["several"], **arguments)


def test_weight_zero_is_no_teacher() -> None:
    inputs = make_inputs(M, N, D, torch.float32)
    for teacher in (teacher_of(17, 0.0), [teacher_of(17, 0.0)] * 2, []):
        assert torch.equal(sigmoid_loss(*inputs, teacher=teacher), sigmoid_loss(*inputs))


def test_several_of_one_are_one() -> None:
    inputs, one = make_inputs(M, N, D, torch.float64), teacher_of(17, 0.8)
    half = one._replace(weight=0.4)
    joined, apart = (sigmoid_loss_and_grads(*inputs, teacher=teacher) for teacher in (one, [half, half]))
    for a, b in zip(apart, joined, strict=True):
        assert relative_l2(a, b) < 1e-12


def test_features_that_are_not_contiguous_and_frozen_towers() -> None:
    x, y, t, b = make_inputs(M, N, D, torch.float64)
    teacher = teacher_of(17, 0.5)
    strided = torch.stack([teacher.text_features, teacher.text_features], 1)[:, 1]
    apart = teacher._replace(image_features=teacher.image_features.T.contiguous().T, text_features=strided)
    whole = sigmoid_loss_and_grads(x, y, t, b, teacher=teacher)
    for leaf, gradient in ((x, whole.image_features), (y, whole.text_features)):
        inputs = [v.detach().requires_grad_(v is leaf) for v in (x, y, t, b)]
        loss = sigmoid_loss(*inputs, teacher=apart)
        torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
        (found,) = torch.autograd.grad(loss, [v for v in inputs if v.requires_grad])
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_apart(backend: str, count: int) -> None:
    """|z'| in the hundreds, where a sigmoid is 0 or 1, in float32: nothing is NaN, and the loss is right."""
    inputs = make_inputs(M, N, D, torch.float32, "trained")
    far = teacher_of(17, 0.5 / count, torch.float32, logit_scale=900.0, logit_bias=-100.0)
    if backend == "triton":
        needs_interpreter()
    ours = differentiate(partial(sigmoid_loss, backend=cast(Backend, backend)), inputs, teacher=[far] * count)
    right = gold(inputs, teacher=[far] * count)
    assert max(relative_l2(a, b) for a, b in zip(ours[:3], right[:3], strict=True)) < 2e-5


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_agrees(backend: str, regime: str) -> None:
    """Of dz only rounding is left: judged by its parts, and no worse than eager."""
    if backend == "triton":
        needs_interpreter()
    loss = partial(sigmoid_loss, backend=cast(Backend, backend))
    for dtype in DTYPES if backend != "triton" else (torch.float32, torch.float16):
        inputs = make_inputs(M, N, D, dtype, regime)
        nearly = Inputs(*inputs[:2], inputs.logit_scale * (1 + 2.0**-6), inputs.logit_bias)
        arguments = {"teacher": Teacher(*inputs, 1.0), "positive_offset": None}
        ours, right = differentiate(loss, nearly, **arguments), gold(nearly, **arguments)
        eager = differentiate(sigmoid_loss_reference, Inputs(*(t.to(dtype) for t in nearly)), **arguments)
        allowed = limits(dtype, regime).features * cancellation(nearly, **arguments)
        for mine, plain, expected in zip(ours[1:3], eager[1:3], right[1:3], strict=True):
            error = relative_l2(mine, expected)
            assert error <= allowed, (dtype, error, allowed)
            if dtype in HALF:
                assert error <= max(relative_l2(plain, expected), torch.finfo(dtype).eps), dtype


STUDENT = make_inputs(6, 8, 4, torch.float32)
GOOD = Teacher(*make_inputs(6, 8, 3, torch.float32), 0.5)


@pytest.mark.parametrize(
    ("teacher", "error", "says"),
    [
        (3.0, TypeError, "teacher must be a siglip_kernels.Teacher or a sequence of them, got float"),
        (tuple(GOOD), TypeError, "teacher must be a siglip_kernels.Teacher"),
        ([GOOD, None], TypeError, "teacher must be a siglip_kernels.Teacher"),
        (GOOD._replace(image_features=None), TypeError, "teacher.image_features must be a floating"),
        (
            GOOD._replace(image_features=torch.ones(6, 3, dtype=torch.int64)),
            TypeError,
            "teacher.image_features must be",
        ),
        (GOOD._replace(image_features=torch.ones(5, 3)), ValueError, "teacher.image_features must have 6 rows"),
        (GOOD._replace(text_features=torch.ones(6, 3)), ValueError, "teacher.text_features must have 8 rows"),
        (GOOD._replace(text_features=torch.ones(8, 5)), ValueError, "teacher.text_features have D = 5, teacher.image"),
        (GOOD._replace(text_features=torch.ones(8, 3).half()), TypeError, "teacher.text_features are torch.float16"),
        (GOOD._replace(text_features=torch.ones(8, 3, 1)), ValueError, "teacher.text_features must have 2 dimensions"),
        (
            Teacher(torch.ones(6, 3, device="meta"), torch.ones(8, 3, device="meta"), 1.0),
            ValueError,
            "teacher.image_features is on meta",
        ),
        (
            GOOD._replace(image_features=torch.ones(6, 3, requires_grad=True)),
            ValueError,
            "image_features requires grad",
        ),
        (
            GOOD._replace(logit_scale=torch.ones((), requires_grad=True)),
            ValueError,
            "teacher.logit_scale requires grad",
        ),
        (GOOD._replace(logit_scale="1"), TypeError, "teacher.logit_scale must be a float"),
        (GOOD._replace(logit_bias=torch.ones(2)), ValueError, "teacher.logit_bias must have one element"),
        (GOOD._replace(weight=-0.1), ValueError, "teacher.weight must be at least 0 and at most 1"),
        (GOOD._replace(weight=1.5), ValueError, "teacher.weight must be at least 0 and at most 1"),
        (GOOD._replace(weight=float("nan")), ValueError, "teacher.weight must be"),
        (GOOD._replace(weight=True), TypeError, "teacher.weight must be a float, got bool"),
        ([GOOD, GOOD._replace(weight=2.0)], ValueError, r"teacher\[1\].weight must be"),
        ([GOOD, GOOD._replace(weight=0.6)], ValueError, "teacher: the weights must add up to at most 1, got 1.1"),
    ],
)
def test_what_is_refused(teacher: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        sigmoid_loss(*STUDENT, teacher=teacher)
    sigmoid_loss(*STUDENT, teacher=[GOOD, GOOD])


def test_autocast_casts_a_teacher_as_it_casts_the_student() -> None:
    rounded = [t.bfloat16() if t.dim() else t for t in STUDENT]
    taught = GOOD._replace(image_features=GOOD.image_features.bfloat16(), text_features=GOOD.text_features.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(*STUDENT, teacher=GOOD)
    assert torch.equal(loss, sigmoid_loss(*rounded, teacher=taught))
