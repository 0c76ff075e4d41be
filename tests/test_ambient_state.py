"""The default device and dtype, however set, change nothing: the package names both wherever it makes a tensor."""

from __future__ import annotations

import ast
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import siglip_kernels
from siglip_kernels import SigLipLoss, SigmoidLoss, accumulate, schedule, sigmoid_loss, sigmoid_loss_and_grads, testing
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import make_inputs
from tests.kinds import default_dtype

PACKAGE = Path(siglip_kernels.__file__).parent
SHAPE = (70, 66, 8)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def both() -> Iterator[None]:
    with default_dtype(torch.float64), default_device("meta"):
        yield


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "with torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device and dtype": both,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pairs(M: int, N: int) -> dict[str, dict[str, Any]]:
    ids = {"image_ids": torch.arange(M) % 9, "text_ids": torch.arange(N) % 8}
    weights = {"image_weights": torch.arange(M) % 3 * 0.5 + 0.5, "text_weights": torch.arange(N) % 4 * 300.0}
    return {
        "offset": {"positive_offset": 3},
        "weights": {**weights, "reduction": "mean"},
        "one side's weights": {"text_weights": weights["text_weights"]},
        "left out": {**ids, "ignore_ids": True, "reduction": "sum"},
        "masses": {**ids, **weights, "multi_positive": "weights"},
        "soft targets": {**ids, "multi_positive": "soft_targets", "anchors": "images"},
        "balance": {"positive_weight": 4.0, "label_smoothing": 0.1},
    }


def results(inputs: Any, arguments: dict[str, Any], backend: Any) -> list[Tensor]:
    """Loss, gradients and statistics, by autograd and outside it."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss, stats = sigmoid_loss(*leaves, **arguments, return_stats=True, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *grads, *stats, *sigmoid_loss_and_grads(*inputs, **arguments, backend=backend)]


@pytest.mark.parametrize("backend", ["cpu", "eager", "triton"])
@pytest.mark.parametrize("state", STATES)
def test_the_same_bits(state: str, backend: str) -> None:
    for dtype, (kind, arguments) in itertools.product(DTYPES, pairs(*SHAPE[:2]).items()):
        if backend == "triton" and (dtype is not torch.float16 or kind not in ("offset", "masses")):
            continue  # its interpreter is slow
        inputs = make_inputs(*SHAPE, dtype)
        right = results(inputs, arguments, backend)
        with STATES[state]():
            got = results(inputs, arguments, backend)
        for place, (value, expected) in enumerate(zip(got, right, strict=True)):
            assert value.dtype is expected.dtype, (dtype, kind, place)
            assert torch.equal(value.nan_to_num(), expected.nan_to_num()), (dtype, kind, place)


@pytest.mark.parametrize("state", STATES)
def test_the_scale_of_a_float16_dz(state: str) -> None:
    """Native code reads it as float32: a float64 one was 0 there, a bfloat16 one nonsense."""
    weights = (1.0, 0.75, 3.0, 2.0**-100, 2.0**100, 2.0**-140)
    with STATES[state]():
        found = [
            schedule._dz_scale(
                schedule.FLOAT16_DZ_EXPONENT,
                [torch.tensor(w, dtype=torch.float32, device="cpu")],
                torch.device("cpu"),
            )
            for w in weights
        ]
    assert {t.dtype for t in found} == {torch.float32}
    assert [float(t) for t in found] == [2.0**13, 2.0**14, 2.0**12, 2.0**113, 2.0**-87, 2.0**126]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("state", ["with torch.device", "set_default_device", "float64", "bfloat16"])
def test_compiled(state: str, compiler: str) -> None:
    def step(x: Tensor, y: Tensor, t: float) -> Tensor:
        loss: Tensor = sigmoid_loss(x, y, t, -10.0, text_weights=y[:, 0].detach().float() ** 2 * 1e3)
        return loss

    x, y, *_ = make_inputs(*SHAPE, torch.float16)
    x.requires_grad_()
    right = step(x, y, 10.0)
    with STATES[state]():
        loss = torch.compile(step, backend=compiler)(x, y, 10.0)
        (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)
    torch.testing.assert_close(dx, torch.autograd.grad(right, x)[0], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("state", STATES)
def test_the_other_functions(state: str) -> None:
    x, y, t, b = make_inputs(*SHAPE, torch.float32)
    calls: dict[str, Callable[[], Tensor]] = {
        "SigLipLoss": lambda: SigLipLoss()(x, y, t, b),
        "accumulate": lambda: accumulate([slice(0, 30), slice(30, None)], lambda rows: (x[rows], y[rows], 10.0, -10.0)),
        "reference": lambda: sigmoid_loss_reference(x, y, 10.0, -10.0),
        "float scalars": lambda: sigmoid_loss(x, y, 10.0, -10.0),
        "autocast": lambda: autocast_loss(x, y),
        "make_inputs": lambda: torch.cat([*make_inputs(*SHAPE, torch.float32)[:2]]),
    }
    for name, call in calls.items():
        right = call()
        with STATES[state]():
            got = call()
        assert got.dtype is right.dtype, name
        assert torch.equal(got, right), name


def autocast_loss(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = sigmoid_loss(x, y, 10.0, -10.0)
    return loss


@pytest.mark.parametrize("state", ["device and dtype", "bfloat16"])
def test_the_gradient_checker(state: str) -> None:
    with STATES[state]():
        report = testing.check(sigmoid_loss, dtypes=[torch.float16], shapes=[(20, 30, 8)], regimes=["trained"])
    assert report.ok, report


@pytest.mark.parametrize("state", ["float64", "bfloat16", "float16"])
def test_the_module_s_parameters_are_float32(state: str) -> None:
    with STATES[state]():
        module = SigmoidLoss()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


# Ambient state reaches a tensor through these; new_… functions take device and dtype from a tensor.
FACTORIES = {
    *("empty", "zeros", "ones", "full", "tensor", "as_tensor", "asarray", "scalar_tensor", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm", "normal", "empty_strided", "empty_permuted", "complex", "tril_indices"),
}


def unnamed(source: str, file: str = "") -> list[str]:
    """The factory calls in ``source`` that leave device or dtype to ambient state."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function, keywords = node.func, {keyword.arg for keyword in node.keywords}
        name, called = name_of(function), node.args[:1]
        if isinstance(function, ast.Name) and function.id == "partial" and called:
            name = name_of(called[0])
        if name in FACTORIES and not {"device", "dtype"} <= keywords:
            found.append(f"{file}:{node.lineno}: torch.{name}")
    return found


def name_of(function: ast.expr) -> str:
    """``name`` of ``torch.name``."""
    is_torch = (
        isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "torch"
    )
    return function.attr if is_torch else ""  # type: ignore[attr-defined]


def test_every_factory_call_names_device_and_dtype() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [line for file in files for line in unnamed(file.read_text(encoding="utf-8"), file.name)]
    assert found == []


def test_the_search_for_factory_calls_finds_them() -> None:
    assert len(unnamed("torch.empty(3)\ntorch.ones((), dtype=d)\npartial(torch.zeros, 3, device=d)")) == 3
    assert (
        unnamed(
            "torch.empty(3, dtype=d, device=e)\nx.new_empty(3)\ntl.zeros(3)\npartial(torch.ones, dtype=d, device=e)"
        )
        == []
    )
