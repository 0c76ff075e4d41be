"""Diagnostics of the logits, against the logits written out; and what they must not change."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from siglip_kernels import LogitStats, SigmoidLoss, accumulate, backends, sigmoid_loss, sigmoid_loss_and_grads, stats
from siglip_kernels.backends.base import Problem
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import PAIRS, Inputs, make_inputs

CPU = torch.device("cpu")
SHAPE = (70, 90, 24)
BACKENDS = [
    (name, dtype)
    for name, dtypes in (
        ("eager", (torch.float64, torch.float32, torch.bfloat16)),
        ("cpu", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        ("triton", (torch.float32, torch.float16)),
    )
    for dtype in dtypes
]


def runs(name: str, dtype: torch.dtype) -> None:
    reasons = backends.why_not_prepared(name, Problem(*SHAPE, dtype, CPU))
    if reasons:
        pytest.skip("; ".join(reasons))


def by_hand(inputs: Inputs, pairs: dict[str, Any]) -> list[float]:
    """The fields of LogitStats, pair by pair in Python's floats."""
    x, y, t, b = (v.double() for v in inputs)
    z = (t * (x @ y.T) + b).tolist()
    u, v = (pairs.get(f"{side}_weights") for side in ("image", "text"))
    classes: dict[bool, list[float]] = {True: [], False: []}
    for i, j in itertools.product(range(len(x)), range(len(y))):
        offset = pairs.get("positive_offset", 0)
        on_diagonal = offset is not None and i + offset == j
        same = "image_ids" in pairs and bool(pairs["image_ids"][i] == pairs["text_ids"][j])
        ignore = pairs.get("ignore_ids", False)
        if (ignore and same and not on_diagonal) or (u is not None and u[i] == 0) or (v is not None and v[j] == 0):
            continue
        classes[same if "image_ids" in pairs and not ignore else on_diagonal].append(z[i][j])
    results: list[float] = []
    for chosen in (classes[True], classes[False]):
        mean = math.fsum(chosen) / len(chosen) if chosen else math.nan
        results += [mean, min(chosen, default=math.inf), max(chosen, default=-math.inf), len(chosen)]
    return results


def assert_right(found: LogitStats, right: list[float], dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    limit = 1e-12 if dtype is torch.float64 else 3e-6
    for name, value, expected in zip(LogitStats._fields, found, right, strict=True):
        assert value.shape == ()
        assert not value.requires_grad
        if name.endswith("count"):
            assert value.dtype is torch.int64
            assert int(value) == expected, name
            continue
        assert value.dtype is wide
        # Logits are as large as 10: what rounds is their sum, not the mean, which may cancel.
        assert float(value) == pytest.approx(expected, rel=limit, abs=10 * limit, nan_ok=True), name


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("name", "dtype"), BACKENDS, ids=str)
def test_against_the_logits(name: str, dtype: torch.dtype, kind: str) -> None:
    runs(name, dtype)
    inputs, pairs = make_inputs(*SHAPE, dtype, "trained"), PAIRS[kind](*SHAPE[:2], CPU)
    right = by_hand(inputs, pairs)
    arguments: Any = {**pairs, "backend": name, "return_stats": True}
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss, found = sigmoid_loss(*leaves, **arguments)
    loss.backward()
    assert_right(found, right, dtype)
    _, forward_only = sigmoid_loss(*inputs, **arguments)
    grads, beside_grads = sigmoid_loss_and_grads(*inputs, **arguments)
    # Nothing else moves by a bit, and the stats are the same however they are asked for.
    without = sigmoid_loss_and_grads(*inputs, **{**arguments, "return_stats": False})
    if name != "cpu":
        assert all(torch.equal(a, b) for a, b in zip(grads, without, strict=True))
    for other in (forward_only, beside_grads):
        assert all(torch.equal(a, b) or (a.isnan() and b.isnan()) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("kind", PAIRS)
def test_the_definition(kind: str) -> None:
    inputs, pairs = make_inputs(*SHAPE, torch.float64, "trained"), PAIRS[kind](*SHAPE[:2], CPU)
    loss, found = sigmoid_loss_reference(*inputs, **pairs, return_stats=True)
    assert_right(found, by_hand(inputs, pairs), torch.float64)
    assert torch.equal(loss, sigmoid_loss_reference(*inputs, **pairs))


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (3, 4)])
@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_empty_classes(name: str, M: int, N: int) -> None:
    runs(name, torch.float32)
    _, found = sigmoid_loss(
        *make_inputs(M, N, 8, torch.float32), positive_offset=None, reduction="sum", backend=name, return_stats=True
    )
    assert [float(v) for v in found[1:4]] == [math.inf, -math.inf, 0]
    assert found.positive_mean.isnan()
    assert int(found.negative_count) == M * N


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_nan_shows_in_the_mean(name: str) -> None:
    runs(name, torch.float32)
    inputs = make_inputs(40, 50, 8, torch.float32)
    inputs.image_features[7, 3] = math.nan
    _, found = sigmoid_loss(*inputs, backend=name, return_stats=True)
    assert found.positive_mean.isnan()
    assert found.negative_mean.isnan()


class Small(EagerBlockKernel):
    """Several blocks a side."""

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        return 32, 48


def test_several_blocks_and_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", Small())
    inputs, pairs = make_inputs(*SHAPE, torch.float32), PAIRS["soft targets"](*SHAPE[:2], CPU)
    first, second = (sigmoid_loss(*inputs, **pairs, backend="eager", return_stats=True)[1] for _ in range(2))
    assert_right(first, by_hand(inputs, pairs), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def swapped(original: Any) -> Any:
    def measure(z: Tensor, pairs: PairSpec, out: Tensor) -> None:
        original(z, pairs, out)
        out[4:] = out[4:].clone().roll(2)

    return measure


def test_swapped_extremes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.eager, "measure_logits", swapped(stats.measure_logits))
    inputs = make_inputs(*SHAPE, torch.float32)
    _, found = sigmoid_loss(*inputs, backend="eager", return_stats=True)
    with pytest.raises(AssertionError, match="_min"):
        assert_right(found, by_hand(inputs, {}), torch.float32)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["diagonal", "ignore ids", "soft targets"])
def test_compiles_whole(kind: str, compiler: str) -> None:
    loss_fn = partial(sigmoid_loss, backend="eager", return_stats=True, **PAIRS[kind](*SHAPE[:2], CPU))
    compiled = torch.compile(loss_fn, backend=compiler, fullgraph=True)
    results = []
    for function in (loss_fn, compiled):
        leaves = [t.requires_grad_() for t in make_inputs(*SHAPE, torch.float32)]
        loss, found = function(*leaves)
        assert not any(t.requires_grad for t in found)
        results.append([*found, loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_module_and_accumulate_pass_them_through() -> None:
    inputs, pairs = make_inputs(*SHAPE, torch.float32), PAIRS["ignore ids"](*SHAPE[:2], CPU)
    module = SigmoidLoss(float(inputs.logit_scale), float(inputs.logit_bias), backend="eager")
    _, found = module(*inputs[:2], **pairs, return_stats=True)
    assert_right(found, by_hand(inputs, pairs), torch.float32)
    halves = [(slice(0, 30), slice(0, 50)), (slice(30, None), slice(50, None))]
    loss, found = accumulate(
        halves, lambda half: (inputs[0][half[0]], inputs[1][half[1]], *inputs[2:]), **pairs, return_stats=True
    )
    assert_right(found, by_hand(inputs, pairs), torch.float32)
    assert not loss.requires_grad
    one, found = accumulate([inputs], tuple, **pairs, return_stats=True)
    assert_right(found, by_hand(inputs, pairs), torch.float32)
    assert float(one) == pytest.approx(float(loss))
