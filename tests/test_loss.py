"""Values and gradients of the public loss, against float64 and against the definition written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels import SigmoidLossGrads
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import (
    COLUMNS,
    Grads,
    Inputs,
    check,
    differentiate,
    gold,
    make_inputs,
    relative_l2,
    scalar_terms,
)
from tests.comparison import HALF, NAMES, assert_matches, loss_and_grads, loss_fn, tight, worst

# The number of cases is what counts here, so shapes are tiny: M > N, M < N, odd D.
TINY = ((9, 7, 5), (6, 11, 3))


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
