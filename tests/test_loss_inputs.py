"""Inputs of every form: strides, no rows, one tensor twice, autocast, values that are not finite."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import Inputs, Limits, differentiate, make_inputs, relative_l2
from tests.comparison import FLOAT64, HALF, NAMES, assert_matches, loss_and_grads, loss_fn, worst


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
