"""Traced and exported programs: on other inputs they give the loss and its gradients; and how often one compiles."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from siglip_kernels import LogitStats, SigmoidLoss, sigmoid_loss
from siglip_kernels.testing import Inputs, differentiate, make_inputs

SHAPE = (9, 7, 5)
IDS = {"image_ids": torch.arange(9) % 3, "text_ids": torch.arange(7) % 4}
PAIRS: dict[str, dict[str, Any]] = {
    "offset": {"positive_offset": 2},
    "ids and weights": {**IDS, "image_weights": torch.arange(9) % 3 + 0.5, "reduction": "mean"},
    "soft targets": {**IDS, "multi_positive": "soft_targets"},
}


class Module(nn.Module):
    def __init__(self, pairs: dict[str, Any], backend: Any = "cpu") -> None:
        super().__init__()
        self.pairs, self.backend = pairs, backend

    def forward(self, x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
        loss: Tensor = sigmoid_loss(x, y, t, b, **self.pairs, backend=self.backend)
        return 2 * loss


def with_grad(inputs: Inputs) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in inputs]


def traced_by_jit(module: Module, inputs: Inputs) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.jit.trace(module, tuple(inputs))


def exported(module: Module, inputs: Any, **options: Any) -> Any:
    return torch.export.export(module, tuple(inputs), **options).module()


TRACERS: dict[str, Callable[[Module, Inputs], Any]] = {
    "jit.trace": traced_by_jit,
    "make_fx": lambda m, inputs: make_fx(lambda *leaves: m(*leaves))(*inputs),
    "make_fx, pre-dispatch": lambda m, inputs: make_fx(lambda *leaves: m(*leaves), pre_dispatch=True)(*inputs),
    "export": exported,
    "export, strict": partial(exported, strict=True),
    "export, with gradients": lambda m, inputs: exported(m, with_grad(inputs)),
    "export, strict, with gradients": lambda m, inputs: exported(m, with_grad(inputs), strict=True),
    "export, decomposed": lambda m, i: torch.export.export(m, tuple(i)).run_decompositions().module(),
}


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_was_traced_has_value_and_gradients(tracer: str, pairs: str) -> None:
    module = Module(PAIRS[pairs])
    traced = TRACERS[tracer](module, make_inputs(*SHAPE, torch.float32))
    for seed in (1, 2):
        other = make_inputs(*SHAPE, torch.float32, "trained", seed=seed)
        right = differentiate(module, other)
        with torch.no_grad():
            assert torch.equal(traced(*other), right.loss)
        for value, expected in zip(differentiate(traced, other), right, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_step_has_the_gradients_in_it(mode: str, pre_dispatch: bool) -> None:
    """Not those of the inputs that it was traced with."""
    module = Module(PAIRS["offset"])

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        loss = module(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    inputs, other = (make_inputs(*SHAPE, torch.float32, seed=seed) for seed in (0, 1))
    traced = make_fx(step, tracing_mode=mode, pre_dispatch=pre_dispatch)(*inputs)
    for value, expected in zip(traced(*other), step(*other), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_a_graph_with_its_gradients_in_it_is_not_differentiated_again() -> None:
    module = Module(PAIRS["offset"])
    inputs = make_inputs(*SHAPE, torch.float32)
    traced = make_fx(lambda *leaves: module(*leaves))(*with_grad(inputs))
    torch.testing.assert_close(traced(*inputs), module(*inputs))
    with pytest.raises(RuntimeError, match="traced with its gradients"):
        traced(*with_grad(inputs))


def test_exported_for_every_batch_size() -> None:
    M, N = torch.export.Dim("M"), torch.export.Dim("N")
    module = Module({})
    inputs = make_inputs(*SHAPE, torch.float32)
    whole = exported(module, inputs, dynamic_shapes=({0: M}, {0: N}, None, None))
    for shape in ((4, 11, 5), (200, 130, 5)):
        other = make_inputs(*shape, torch.float32)
        assert torch.equal(whole(*other), module(*other))


def test_an_exported_module_is_saved_and_loaded(tmp_path: Path) -> None:
    module = SigmoidLoss(10.0, backend="cpu")
    x, y, *_ = make_inputs(*SHAPE, torch.float32)
    torch.export.save(torch.export.export(module, (x, y)), tmp_path / "loss.pt2")
    loaded = torch.export.load(tmp_path / "loss.pt2").module()
    loss = loaded(x, y)
    assert torch.equal(loss, module(x, y))
    right = torch.autograd.grad(module(x, y), list(module.parameters()))
    for value, expected in zip(torch.autograd.grad(loss, list(loaded.parameters())), right, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("tracer", ["jit.trace", "make_fx", "export"])
def test_statistics_are_traced_too(tracer: str) -> None:
    class Means(Module):
        def forward(self, x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
            loss, stats = sigmoid_loss(x, y, t, b, return_stats=True, backend="cpu")
            assert isinstance(stats, LogitStats)
            return torch.stack([loss, stats.positive_mean, stats.negative_max])

    module = Means({})
    traced = TRACERS[tracer](module, make_inputs(*SHAPE, torch.float32))
    other = make_inputs(*SHAPE, torch.float32, seed=1)
    torch.testing.assert_close(traced(*other), module(*other))


def test_a_counter_of_operations_changes_nothing() -> None:
    module, inputs = Module(PAIRS["ids and weights"]), make_inputs(*SHAPE, torch.float32)
    right = differentiate(module, inputs)
    with FlopCounterMode(display=False):
        counted = differentiate(module.forward, inputs)
    for value, expected in zip(counted, right, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


# Recompilation: plain torch compiles twice, once for the first value and once for all others.


CHANGING: dict[str, Callable[..., Tensor]] = {
    "scale": lambda x, y, t, b, k: sigmoid_loss(x, y, t, -10.0),
    "bias": lambda x, y, t, b, k: sigmoid_loss(x, y, 10.0, b),
    "scale and bias": lambda x, y, t, b, k: sigmoid_loss(x, y, t, b),
    "scale, with ids": lambda x, y, t, b, k: sigmoid_loss(x, y, t, -10.0, **IDS),
    "offset": lambda x, y, t, b, k: sigmoid_loss(x, y, 10.0, -10.0, positive_offset=k),
    "all three": lambda x, y, t, b, k: sigmoid_loss(x, y, t, b, positive_offset=k),
    "an expression": lambda x, y, t, b, k: sigmoid_loss(x, y, 10.0, -t),
    "all three, an expression": lambda x, y, t, b, k: sigmoid_loss(x, y, t, -t, positive_offset=k),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", CHANGING)
def test_a_number_that_changes_every_step_compiles_twice(what: str, compiler: str, grad: bool) -> None:
    if "expression" in what and compiler == "aot_eager" and torch.__version__ < (2, 13):
        pytest.skip("torch before 2.13 compiles an expression of floats at every value, in plain torch too")
    check_compilations(what, compiler, grad)


@pytest.mark.parametrize("what", ["scale", "offset"])
def test_by_inductor_too(what: str) -> None:
    check_compilations(what, "inductor", grad=True)


def check_compilations(what: str, compiler: str, grad: bool) -> None:
    counter = CompileCounterWithBackend(compiler)
    x, y, *_ = make_inputs(*SHAPE, torch.float32)
    x.requires_grad_(grad)
    step = torch.compile(CHANGING[what], backend=counter, fullgraph=True)
    for k in range(12):
        t = 10.0 + 0.1 * k
        loss, right = (f(x, y, t, -t, k) for f in (step, CHANGING[what]))
        torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)
        if grad:
            got, expected = (torch.autograd.grad(value, x)[0] for value in (loss, right))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    assert counter.frame_count <= 3, counter.frame_count


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_one_tensor_as_scale_and_bias(compiler: str) -> None:
    x, y, *_ = make_inputs(*SHAPE, torch.float32)

    def step(t: Tensor) -> Tensor:
        loss: Tensor = sigmoid_loss(x, y, t, t)
        return loss

    t = torch.tensor(0.5, requires_grad=True)
    compiled = torch.compile(step, backend=compiler, fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(t), t)[0], torch.autograd.grad(step(t), t)[0])
