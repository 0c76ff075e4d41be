"""Values and gradients of the public loss, against float64 and against the definition written out by hand."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import siglip_kernels
from siglip_kernels import SigmoidLoss, SigmoidLossGrads, sigmoid_loss
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import (
    COLUMNS,
    Grads,
    Inputs,
    Limits,
    check,
    differentiate,
    gold,
    limits,
    make_inputs,
    relative_l2,
    scalar_terms,
)

loss_fn = partial(sigmoid_loss, backend="eager")
loss_and_grads = partial(siglip_kernels.sigmoid_loss_and_grads, backend="eager")

FLOAT64 = Limits(1e-12, 1e-12, 1e-12)
HALF = (torch.float16, torch.bfloat16)
NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")

# The number of cases is what counts here, so shapes are tiny: M > N, M < N, odd D.
TINY = ((9, 7, 5), (6, 11, 3))


def worst(value: Tensor, expected: Tensor) -> str:
    """The coordinate where they differ most, with both values."""
    difference = (value.double() - expected.double()).abs().nan_to_num(math.inf, math.inf)
    if not difference.numel():
        return "empty"
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"at {list(index)}: {float(value[index]):.9g}, expected {float(expected[index]):.9g}"


def assert_matches(
    ours: Any, inputs: Inputs, what: str, limit: Limits, upstream: float = 1.0, **arguments: Any
) -> None:
    """Relative errors of the loss and of the four gradients within ``limit``; dscale and dbias against Σ|terms|."""
    expected = gold(inputs, upstream, **arguments)
    terms = scalar_terms(inputs, upstream, **arguments)
    errors = [relative_l2(value, right) for value, right in zip(ours[:3], expected[:3], strict=True)]
    for value, right, size in zip(ours[3:], expected[3:], terms, strict=True):
        difference = float((value.double().reshape(()) - right.reshape(())).abs())
        errors.append(difference / size if size else difference)
    bounds = (limit.loss, limit.features, limit.features, limit.scalars, limit.scalars)
    failures = [
        f"{what}: {name} {error:.2e} > {bound:.2e} {worst(value.reshape(right.shape), right)}"
        for name, error, bound, value, right in zip(COLUMNS, errors, bounds, ours, expected, strict=True)
        if not error <= bound
    ]
    assert not failures, "\n".join(failures)


def tight(dtype: torch.dtype, regime: str = "init") -> Limits:
    return FLOAT64 if dtype is torch.float64 else limits(dtype, regime)


def by_hand(inputs: Inputs, positive: Callable[[int, int], bool], u: list[float], v: list[float], over: float) -> Grads:
    """The loss and its gradients term by term in Python's floats, straight from the paper's formulas."""
    x, y, t, b = (tensor.tolist() for tensor in inputs)
    D = len(x[0])
    loss, dt, db = 0.0, 0.0, 0.0
    dx, dy = [[0.0] * D for _ in x], [[0.0] * D for _ in y]
    for i, j in itertools.product(range(len(x)), range(len(y))):
        inner = math.fsum(p * q for p, q in zip(x[i], y[j], strict=True))
        s = 1.0 if positive(i, j) else -1.0
        a = -s * (t * inner + b)
        weight = u[i] * v[j] / over
        loss += weight * (max(a, 0.0) + math.log1p(math.exp(-abs(a))))
        dz = -s * weight / (1.0 + math.exp(-a))
        dt += dz * inner
        db += dz
        for d in range(D):
            dx[i][d] += t * dz * y[j][d]
            dy[j][d] += t * dz * x[i][d]
    return Grads(*(torch.tensor(value, dtype=torch.float64) for value in (loss, dx, dy, dt, db)))


# Two ragged sides; weights that differ by row and column, with a zero.
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("labels", ["offset", "ids", "none"])
def test_the_definition_is_the_formula(labels: str, reduction: str) -> None:
    M, N = 5, 4
    inputs = make_inputs(M, N, 3, torch.float64, "flat")._replace(logit_scale=torch.tensor(7.0, dtype=torch.float64))
    u, v = [1.0, 0.5, 0.0, 2.0, 1.5], [0.25, 3.0, 1.0, 0.0]
    image_ids, text_ids = [4, 4, 7, -1, 9], [7, 4, -1, 4]
    arguments: dict[str, Any] = {
        "offset": {"positive_offset": -1},
        "ids": {"image_ids": torch.tensor(image_ids), "text_ids": torch.tensor(text_ids)},
        "none": {"positive_offset": None},
    }[labels]
    positive = {
        "offset": lambda i, j: i - 1 == j,
        "ids": lambda i, j: image_ids[i] == text_ids[j],
        "none": lambda i, j: False,
    }[labels]
    arguments |= {"image_weights": torch.tensor(u), "text_weights": torch.tensor(v), "reduction": reduction}
    over = {"batchmean": sum(u), "mean": sum(u) * sum(v), "sum": 1.0}[reduction]
    expected = by_hand(inputs, positive, u, v, over)
    for fn in (sigmoid_loss_reference, loss_fn):
        for name, value, right in zip(COLUMNS, differentiate(fn, inputs, **arguments), expected, strict=True):
            assert relative_l2(value, right) < 1e-13, (fn, name, worst(value, right))


LABELS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "diagonal": lambda M, N: {},
    "above": lambda M, N: {"positive_offset": 2},
    "below": lambda M, N: {"positive_offset": -3},
    "last column only": lambda M, N: {"positive_offset": N - 1},
    "just beyond": lambda M, N: {"positive_offset": -M},
    "none": lambda M, N: {"positive_offset": None},
    "ids": lambda M, N: {"image_ids": torch.arange(M) % 4, "text_ids": torch.arange(N) % 3},
    "ids of two dtypes": lambda M, N: {
        "image_ids": torch.arange(M, dtype=torch.int32) - 3,
        "text_ids": 3 - torch.arange(N),
        "positive_offset": None,
    },
    "ids that never meet": lambda M, N: {"image_ids": torch.arange(M), "text_ids": -1 - torch.arange(N)},
}
WEIGHTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "unweighted": lambda M, N: {},
    "images": lambda M, N: {"image_weights": torch.linspace(0, 3, M)},
    "texts": lambda M, N: {"text_weights": torch.linspace(2, 0, N, dtype=torch.float64)},
    "both": lambda M, N: {"image_weights": torch.arange(M) % 3, "text_weights": torch.arange(N) % 2 == 0},
}


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("labels", LABELS)
def test_labels_weights_and_reductions(labels: str, weights: str, reduction: str) -> None:
    for (M, N, D), dtype in itertools.product(TINY, (torch.float64, torch.float32, torch.bfloat16)):
        arguments = {**LABELS[labels](M, N), **WEIGHTS[weights](M, N), "reduction": reduction}
        inputs = make_inputs(M, N, D, dtype)
        ours = differentiate(loss_fn, inputs, **arguments)
        assert_matches(ours, inputs, f"{dtype} {(M, N, D)} init", tight(dtype), **arguments)


# (M, N, D): one pair; one image; one text and a wide D; either side of a 128-tile with odd D.
RAGGED = ((1, 1, 8), (1, 129, 33), (127, 1, 1152), (127, 129, 100))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_ragged_shapes_in_every_regime(device: torch.device, dtype: torch.dtype) -> None:
    report = check(loss_fn, device=device, dtypes=[dtype], shapes=RAGGED)
    assert report.ok, report


# (M, N, D): the feature widths of SigLIP's models; then just beyond one 1024-block a side, narrow to be quick, where a
# sum of a million terms in plain float32 shows in dscale.
@pytest.mark.parametrize("shape", [(70, 130, 768), (130, 70, 1024), (66, 65, 1152), (1030, 1050, 32)])
def test_wide_features_and_several_blocks(shape: tuple[int, int, int]) -> None:
    report = check(loss_fn, shapes=[shape], regimes=["trained"], pairs=["diagonal", "weights"])
    assert report.ok, report


# The last rows of several blocks are padding too; (1030, 1026) is just beyond one 1024-block a side.
@pytest.mark.parametrize("shape", [(5, 7, 6), (1000, 1020, 4)])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_rows_of_weight_zero_change_nothing(shape: tuple[int, int, int], reduction: str) -> None:
    (M, N, D), padding = shape, (30, 6)
    inputs = make_inputs(M, N, D, torch.float64, "trained")
    garbage = [1e3 * torch.randn(rows, D, dtype=torch.float64) for rows in padding]
    padded = inputs._replace(
        image_features=torch.cat([inputs.image_features, garbage[0]]),
        text_features=torch.cat([inputs.text_features, garbage[1]]),
    )
    ones = {
        "image_weights": torch.cat([torch.ones(M), torch.zeros(padding[0])]),
        "text_weights": torch.cat([torch.ones(N), torch.zeros(padding[1])]),
    }
    right = differentiate(loss_fn, inputs, reduction=reduction)
    ours = differentiate(loss_fn, padded, reduction=reduction, **ones)
    assert not ours.image_features[M:].any()
    assert not ours.text_features[N:].any()
    cut = ours._replace(image_features=ours.image_features[:M], text_features=ours.text_features[:N])
    for name, value, expected in zip(COLUMNS, cut, right, strict=True):
        assert relative_l2(value, expected) < 1e-12, (name, shape, worst(value, expected))


SCALARS: dict[str, Callable[[float], float | Tensor]] = {
    "float": lambda value: value,
    "int": lambda value: int(value),
    **{
        f"{shape!s} {str(dtype).removeprefix('torch.')}": partial(torch.full, shape, dtype=dtype)
        for shape in ((), (1,), (1, 1))
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", SCALARS)
@pytest.mark.parametrize("bias", ["float", "() float32", "(1,) bfloat16", "(1, 1) float64", "no bias"])
def test_scalars_of_every_kind(scale: str, bias: str, dtype: torch.dtype) -> None:
    # 10 and -9 are exact in every dtype, so that gold sees the same numbers.
    t = SCALARS[scale](10.0)
    b = None if bias == "no bias" else SCALARS[bias](-9.0)
    x, y, *_ = make_inputs(6, 5, 4, dtype)
    as_gold = [torch.tensor(value, dtype=torch.float64) for value in (10.0, 0.0 if b is None else -9.0)]
    expected = gold(Inputs(x, y, *as_gold))
    terms = scalar_terms(Inputs(x, y, *as_gold))

    leaves = [value.requires_grad_() for value in (t, b) if isinstance(value, Tensor)]
    loss = loss_fn(x, y, t, b)
    assert loss.shape == ()
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert relative_l2(loss.detach(), expected.loss) <= tight(dtype).loss
    if leaves:
        loss.backward()
    everything = loss_and_grads(x, y, t, b)
    assert (everything.logit_bias is None) == (b is None)
    assert torch.equal(everything.loss, loss)
    for name, value in (("logit_scale", t), ("logit_bias", b)):
        returned = getattr(everything, name)
        if isinstance(value, Tensor):
            assert value.grad is not None
            assert value.grad.shape == value.shape == returned.shape
            assert value.grad.dtype is value.dtype is returned.dtype
            assert torch.equal(value.grad, returned)
            right = getattr(expected, name)
            rounding = torch.finfo(value.dtype).eps / 2 * float(right.abs())
            error = float((value.grad.double().reshape(()) - right).abs())
            assert error <= tight(dtype).scalars * getattr(terms, name) + rounding, (name, value.grad, right)
        elif value is not None:
            assert returned.shape == ()
            assert returned.dtype is loss.dtype


# 1030 texts: two blocks, so that the accumulation over blocks takes part.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_requires_grad_subset(wanted: tuple[bool, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(40, 1030, 6, dtype, "trained")
    full = differentiate(loss_fn, inputs, positive_offset=3)
    leaves = [t.clone().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
    loss = loss_fn(*leaves, positive_offset=3)
    assert torch.equal(loss, full.loss)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for name, leaf, right, asked in zip(NAMES, leaves, full[1:], wanted, strict=True):
        assert (leaf.grad is not None) == asked, name
        assert leaf.grad is None or torch.equal(leaf.grad, right), (name, worst(leaf.grad, right))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_grads_is_autograd_bitwise(dtype: torch.dtype, bias: bool) -> None:
    inputs = make_inputs(33, 21, 17, dtype, "trained")
    arguments = {"positive_offset": -2, "image_weights": torch.rand(33), "reduction": "mean"}
    leaves = [t.clone().requires_grad_() for t in inputs[: 4 if bias else 3]]
    loss = loss_fn(*leaves, **arguments)
    loss.backward()
    ours = loss_and_grads(*leaves, **arguments)
    assert isinstance(ours, SigmoidLossGrads)
    assert ours._fields == ("loss", *NAMES)
    assert (ours.logit_bias is not None) == bias
    for name, value, right in zip(ours._fields, ours, [loss, *(leaf.grad for leaf in leaves)], strict=False):
        assert right is not None
        assert value.dtype is right.dtype, name
        assert torch.equal(value, right), (name, worst(value, right))
        assert not value.requires_grad


def strided(shape: tuple[int, int]) -> dict[str, Tensor]:
    M, D = shape
    return {
        "every other column": torch.randn(M, 2 * D)[:, ::2],
        "transposed": torch.randn(D, M).T,
        "expanded rows": torch.randn(1, D).expand(M, D),
        "expanded columns": torch.randn(M, 1).expand(M, D),
        "offset rows": torch.randn(M + 3, D + 5)[2:-1, 4:-1],
    }


@pytest.mark.parametrize("kind", list(strided((1, 1))))
def test_strided_inputs(kind: str) -> None:
    x, y = strided((6, 4))[kind], strided((9, 4))[kind]
    weights = {"image_weights": torch.tensor(0.5).expand(6), "text_weights": torch.rand(18)[::2]}
    ids = {"image_ids": torch.tensor(1).expand(6), "text_ids": torch.arange(18)[::2] // 4}
    right = loss_and_grads(x.contiguous(), y.contiguous(), 10.0, -10.0, **weights, **ids)
    leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    assert leaves[0].stride() == x.stride()
    loss = loss_fn(*leaves, 10.0, -10.0, **weights, **ids)
    assert torch.equal(loss, right.loss)
    for leaf, grad, value in zip(leaves, torch.autograd.grad(loss, leaves), right[1:3], strict=True):
        assert grad.shape == leaf.shape
        assert torch.equal(grad, value), worst(grad, value)


def test_gradient_of_an_expanded_row_is_the_sum_over_its_copies() -> None:
    row, y = torch.randn(1, 4, requires_grad=True), torch.randn(9, 4)
    loss_fn(row.expand(6, 4), y, 10.0, -10.0).backward()
    right = loss_and_grads(row.expand(6, 4), y, 10.0, -10.0).image_features.sum(0, keepdim=True)
    assert row.grad is not None
    assert relative_l2(row.grad, right) < 1e-6


def test_one_tensor_as_both_arguments_gets_both_gradients() -> None:
    x = F.normalize(torch.randn(6, 4, dtype=torch.float64)).requires_grad_()
    (dx,) = torch.autograd.grad(loss_fn(x, x, 10.0, -10.0), x)
    (right,) = torch.autograd.grad(sigmoid_loss_reference(x, x, 10.0, -10.0), x)
    assert relative_l2(dx, right) < 1e-12, worst(dx, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_images_or_no_texts(M: int, N: int, reduction: str, dtype: torch.dtype) -> None:
    """The loss is 0, or NaN where the denominator is 0, as a mean is; nothing is uninitialised."""
    empty = reduction == "mean" or (reduction == "batchmean" and M == 0)
    ours = differentiate(loss_fn, make_inputs(M, N, 8, dtype), reduction=reduction)
    assert bool(ours.loss.isnan()) if empty else float(ours.loss) == 0.0, ours.loss
    assert ours.image_features.shape == (M, 8)
    assert ours.text_features.shape == (N, 8)
    if not empty:
        assert not any(bool(grad.any()) for grad in ours[1:]), ours


def test_no_features_leave_the_bias() -> None:
    inputs = make_inputs(4, 5, 0, torch.float64, "flat")
    assert_matches(differentiate(loss_fn, inputs), inputs, "(4, 5, 0) flat", FLOAT64)


@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_casts_the_features_alone(dtype: torch.dtype, scalar_dtype: torch.dtype) -> None:
    """The loss and the scalar gradients are far better than any logits rounded to half precision could make them."""
    # 127 × 129: a few hundred thousand products are enough for rounded logits to show; odd sides.
    inputs = make_inputs(127, 129, 100, torch.float32, "trained")
    t, b = (torch.tensor(value, dtype=scalar_dtype) for value in (117.0, -13.0))
    leaves = [value.requires_grad_() for value in (inputs.image_features, inputs.text_features, t, b)]
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_fn(*leaves)
        everything = loss_and_grads(*leaves)
    assert loss.dtype is torch.float32
    (loss * 0.5).backward()
    rounded = [leaf.detach().to(dtype).double() for leaf in leaves[:2]]
    seen = Inputs(*rounded, *(leaf.detach().double() for leaf in leaves[2:]))
    for leaf, value in zip(leaves, everything[1:], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype is leaf.dtype is value.dtype
        assert leaf.grad.shape == leaf.shape
    scalars = 1e-5 if scalar_dtype is torch.float32 else 4e-3
    ours = (loss.detach(), *(leaf.grad for leaf in leaves))
    assert_matches(ours, seen, f"autocast {dtype} (127, 129, 100)", Limits(2e-5, 3.5e-3, scalars), upstream=0.5)
    assert_matches(everything, seen, f"no autograd, {dtype} (127, 129, 100)", Limits(2e-5, 3.5e-3, scalars))


def test_autocast_brings_two_dtypes_together_and_leaves_float64_alone() -> None:
    x, y, t, b = make_inputs(6, 5, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss_fn(x.half(), y, t, b)
        wide = loss_fn(x.double(), y.double(), t, b)
        off = torch.autocast("cpu", enabled=False)
        with off:
            plain = loss_fn(x, y, t, b)
    assert torch.equal(mixed, loss_fn(x.half().bfloat16(), y.bfloat16(), t, b))
    assert wide.dtype is torch.float64
    assert torch.equal(wide, loss_fn(x.double(), y.double(), t, b))
    assert torch.equal(plain, loss_fn(x, y, t, b))


# Text 1029 lies in the last, ragged column of blocks.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product([*NAMES, "image_weights", "text_weights"], [math.nan, math.inf]),
        *itertools.product(NAMES, [-math.inf]),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_nan_and_inf_reach_the_loss(name: str, value: float, grad: bool) -> None:
    for dtype in (torch.float32, torch.float16):
        arguments: dict[str, Any] = dict(zip(NAMES, make_inputs(9, 1030, 4, dtype), strict=True))
        arguments |= {"image_weights": torch.ones(9), "text_weights": torch.ones(1030)}
        arguments[name].view(-1)[-1] = value
        if grad:
            arguments["logit_scale"].requires_grad_()
        loss = loss_fn(**arguments)
        assert not loss.isfinite(), (name, dtype, loss)
        if name == "image_features" and math.isnan(value) and not grad:
            ours = differentiate(loss_fn, Inputs(*(arguments[n] for n in NAMES)))
            assert ours.image_features[-1].isnan().all()
            assert ours.text_features.isnan().all()
            assert ours.logit_scale.isnan()


def test_nan_in_padding_reaches_the_loss() -> None:
    """A weight of 0 is a factor, as the definition says, and does not hide a NaN."""
    inputs = make_inputs(4, 5, 3, torch.float32)
    inputs.image_features[3, 1] = math.nan
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert sigmoid_loss_reference(*inputs, image_weights=weights).isnan()
    assert loss_fn(*inputs, image_weights=weights).isnan()


def test_the_loss_may_be_changed_in_place() -> None:
    inputs = make_inputs(7, 5, 4, torch.float32)
    right = loss_and_grads(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = loss_fn(*leaves)
    loss /= 2
    loss.backward()
    assert torch.equal(loss, right.loss / 2)
    for leaf, grad in zip(leaves, right[1:], strict=True):
        assert torch.equal(leaf.grad, grad / 2)


def test_backward_twice() -> None:
    inputs = make_inputs(7, 5, 4, torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = loss_fn(*leaves)
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, grad in zip(leaves, loss_and_grads(*inputs)[1:], strict=True):
        assert torch.equal(leaf.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_the_last_backward_turns_the_accumulators_into_the_gradients() -> None:
    """No copy, unless the graph is kept: then backward may come again."""
    inputs = make_inputs(7, 5, 4, torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = loss_fn(*leaves)
    kept = [t.data_ptr() for t in loss.grad_fn.saved_tensors[1:3]]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward()
    assert [grad.data_ptr() for grad in first[:2]] != kept
    assert [leaf.grad.data_ptr() for leaf in leaves[:2]] == kept
    for leaf, grad, right in zip(leaves, first, loss_and_grads(*inputs)[1:], strict=True):
        assert torch.equal(leaf.grad, right)
        assert torch.equal(grad, right)


@pytest.mark.parametrize("upstream", [-3.7, 0.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_upstream_gradient(upstream: float, dtype: torch.dtype) -> None:
    """2^16 is what a float16 gradient scaler starts from: it does not fit float16, the gradients here do."""
    inputs = make_inputs(65, 33, 24, dtype)
    arguments = {"positive_offset": None, "reduction": "mean"}
    ours = differentiate(loss_fn, inputs, upstream, **arguments)
    assert_matches(ours, inputs, f"{dtype} (65, 33, 24) init", tight(dtype), upstream, **arguments)


def test_gradients_accumulate() -> None:
    first, second = make_inputs(7, 5, 4, torch.float32), make_inputs(7, 5, 4, torch.float32, seed=1)
    t = torch.tensor([10.0], requires_grad=True)
    x = first.image_features.clone().requires_grad_()
    for inputs in (first, second):
        loss_fn(x, inputs.text_features, t, inputs.logit_bias).backward()
    parts = [loss_and_grads(first.image_features, i.text_features, t, i.logit_bias) for i in (first, second)]
    assert torch.equal(x.grad, parts[0].image_features + parts[1].image_features)
    assert torch.equal(t.grad, parts[0].logit_scale + parts[1].logit_scale)


def test_finite_differences() -> None:
    """Independent of the definition's own backward; z of order 1, so that every term counts."""
    inputs = make_inputs(4, 5, 3, torch.float64)
    x, y = (t.requires_grad_() for t in inputs[:2])
    t, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.3, -0.4))
    assert torch.autograd.gradcheck(partial(loss_fn, positive_offset=1, text_weights=torch.rand(5)), (x, y, t, b))


# (40, 50, 16): one block; (1030, 1050, 8): four, whose partial sums must be added in one order.
@pytest.mark.parametrize("shape", [(40, 50, 16), (1030, 1050, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs = make_inputs(*shape, dtype, "trained")
    first = loss_and_grads(*inputs)
    for garbage in (1e30, math.nan, -1.0, 0.0):
        blocks = [torch.full((size,), garbage) for size in (16, 800, 8400, 1 << 20, 1 << 20, 1 << 20)]
        del blocks
        for name, value, right in zip(first._fields, loss_and_grads(*inputs), first, strict=True):
            assert torch.equal(value, right), (name, shape, garbage)


def test_module_holds_two_scalars() -> None:
    module = SigmoidLoss(backend="eager")
    assert {name: (p.shape, p.dtype) for name, p in module.named_parameters()} == {
        "logit_scale": ((), torch.float32),
        "logit_bias": ((), torch.float32),
    }
    assert list(module.state_dict()) == ["logit_scale", "logit_bias"]
    assert float(module.logit_scale) == pytest.approx(math.log(10.0), rel=1e-6)
    assert float(module.logit_bias) == -10.0
    other = SigmoidLoss(3.0, 1.0)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.logit_scale, module.logit_scale)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="init_logit_scale"):
            SigmoidLoss(bad)


def test_module_parameters_of_one_dimension() -> None:
    module, other = SigmoidLoss(3.0, 1.0, parameter_shape=(1,)), SigmoidLoss()
    x, y, *_ = make_inputs(6, 5, 4, torch.float32)
    module(x, y).backward()
    assert all(p.shape == p.grad.shape == (1,) for p in module.parameters())
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x, y), other(x, y))
    with pytest.raises(ValueError, match="parameter_shape"):
        SigmoidLoss(parameter_shape=(2,))


@pytest.mark.parametrize("bias", [-10.0, None])
def test_module_computes_the_loss(bias: float | None) -> None:
    module = SigmoidLoss(10.0, bias, reduction="mean", backend="eager")
    assert list(module.state_dict()) == ["logit_scale", "logit_bias"][: 1 if bias is None else 2]
    x, y, t, _ = make_inputs(6, 5, 4, torch.float64)
    loss = module(x, y, positive_offset=2, image_weights=torch.arange(6))
    loss.backward()
    arguments = {"positive_offset": 2, "image_weights": torch.arange(6), "reduction": "mean"}
    t, b = module.logit_scale.detach().exp().double(), torch.tensor(bias or 0.0, dtype=torch.float64)
    right = gold(Inputs(x, y, t, b), **arguments)
    assert relative_l2(loss.detach(), right.loss) < 1e-12
    # The parameter holds log t.
    assert relative_l2(module.logit_scale.grad, t * right.logit_scale) < 1e-6
    assert bias is None or relative_l2(module.logit_bias.grad, right.logit_bias) < 1e-6


def test_module_is_copied_and_pickled() -> None:
    module = SigmoidLoss(20.0, -5.0, reduction="sum", backend="eager")
    x, y, *_ = make_inputs(6, 5, 4, torch.float32)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, y), module(x, y))
        assert twin.logit_scale is not module.logit_scale
    assert "sum" in repr(module)
    assert "eager" in repr(module)


def test_training_reduces_the_loss() -> None:
    torch.manual_seed(0)
    data, tower, module = torch.randn(32, 12), torch.nn.Linear(12, 8), SigmoidLoss(backend="eager")
    texts = F.normalize(torch.randn(32, 8))
    optimizer = torch.optim.Adam([*tower.parameters(), *module.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = module(F.normalize(tower(data)), texts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses[:: len(losses) // 4]
    assert float(module.logit_scale) != pytest.approx(math.log(10.0))
    assert float(module.logit_bias) != -10.0
