"""Pairs as users hand them over, on every backend: ids and weights of any dtype, any offset, infinite logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from siglip_kernels import backends, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.backends.base import Problem
from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import gold, make_inputs, relative_l2

B, D = 40, 32


@pytest.fixture(params=["eager", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Any:
    reasons = backends.why_not_prepared(request.param, Problem(B, B, D, torch.float32, torch.device("cpu")))
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def test_ids_of_two_dtypes(backend: Any) -> None:
    """255 and -1 have the same eight bits."""
    inputs = make_inputs(B, B, D, torch.float32)
    ids = {
        "image_ids": torch.full((B,), 255, dtype=torch.uint8),
        "text_ids": torch.full((B,), -1, dtype=torch.int8),
    }
    assert relative_l2(sigmoid_loss(*inputs, **ids, backend=backend), gold(inputs, **ids).loss) < 1e-6


@pytest.mark.parametrize("weights", [torch.bool, torch.int32, torch.float64], ids=str)
def test_weights_of_any_dtype(backend: Any, weights: torch.dtype) -> None:
    """Padding is often a bool. In half precision dz is scaled by the largest weight."""
    inputs = make_inputs(B, B, D, torch.float16)
    padded = {"image_weights": torch.arange(B).clamp(max=1).to(weights), "reduction": "sum"}
    found = sigmoid_loss_and_grads(*inputs, **padded, backend=backend)
    right = gold(inputs, **padded)
    assert relative_l2(found.loss, right.loss) < 2e-5
    assert relative_l2(found.image_features, right.image_features) < 3.5e-3
    assert not found.image_features[0].any()


@pytest.mark.parametrize("offset", [2**70, -(2**70), B, -B])
@pytest.mark.parametrize("ignore_ids", [False, True])
def test_offsets_out_of_range(backend: Any, offset: int, ignore_ids: bool) -> None:
    inputs, ids = make_inputs(B, B, D, torch.float32), torch.arange(B)
    pairs = {"image_ids": ids, "text_ids": ids, "ignore_ids": True} if ignore_ids else {}
    found = sigmoid_loss(*inputs, positive_offset=offset, **pairs, backend=backend)
    assert relative_l2(found, gold(inputs, positive_offset=None, **pairs).loss) < 1e-6


def test_soft_targets_leave_infinite_negatives_alone(backend: Any) -> None:
    """A logit of -inf costs a negative pair nothing, and its mass of 0 does not make that NaN."""
    x, y, _, _ = make_inputs(B, B, D, torch.float32)
    x[0] = torch.inf
    pairs = {"image_ids": torch.arange(B), "text_ids": torch.arange(B) % 7 + 100, "multi_positive": "soft_targets"}
    right = sigmoid_loss_reference(x, y.abs(), -10.0, -10.0, **pairs)
    assert torch.isfinite(right)
    assert relative_l2(sigmoid_loss(x, y.abs(), -10.0, -10.0, **pairs, backend=backend), right) < 1e-5


@pytest.mark.parametrize("labels", [{}, {"positive_offset": 3}, {"image_ids": 7, "text_ids": 5}], ids=str)
def test_balance_is_what_torch_has(backend: Any, labels: dict[str, Any]) -> None:
    """positive_weight is pos_weight of torch's loss, label_smoothing moves its targets."""
    x, y, scale, bias = make_inputs(B, B, D, torch.float32, "trained")
    pairs = {k: torch.arange(B) % v if "ids" in k else v for k, v in labels.items()}
    target = 0.1 + 0.8 * PairSpec(**pairs).positive_mask(B, B).double()
    z = scale.double() * (x.double() @ y.double().T) + bias.double()
    right = F.binary_cross_entropy_with_logits(z, target, pos_weight=torch.tensor(2.5), reduction="sum") / B
    found = sigmoid_loss(x, y, scale, bias, **pairs, positive_weight=2.5, label_smoothing=0.1, backend=backend)
    assert relative_l2(found, right) < 1e-6
