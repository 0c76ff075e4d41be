"""The loss under torch.compile: one graph, one compilation for every batch, the same results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from siglip_kernels import SigmoidLoss
from siglip_kernels.testing import COLUMNS, Grads, Inputs, differentiate, gold, make_inputs, relative_l2
from tests.comparison import loss_fn
from tests.operator_calls import PAIRS, SHAPE, pairs_of


def compiled_step(step: Callable[..., Tensor], compiler: Any, **options: Any) -> Callable[..., Grads]:
    """``step`` compiled whole, and differentiated."""
    whole = torch.compile(step, backend=compiler, fullgraph=True, **options)
    return lambda inputs, **arguments: differentiate(whole, inputs, **arguments)


def assert_same(ours: Grads, right: Grads, what: str, bound: float = 1e-6) -> None:
    for name, value, expected in zip(COLUMNS, ours, right, strict=True):
        assert value.dtype is expected.dtype, (what, name)
        error = relative_l2(value, expected)
        assert error <= bound, f"{what}: {name} {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", PAIRS)
def test_compiles_whole(kind: str, compiler: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs, arguments = make_inputs(*SHAPE, dtype), pairs_of(kind, *SHAPE[:2])
        ours = compiled_step(loss_fn, compiler)(inputs, **arguments)
        assert_same(ours, differentiate(loss_fn, inputs, **arguments), f"{compiler} {dtype} {SHAPE} {kind}", 0.0)


def test_compiles_whole_by_inductor() -> None:
    """With elementwise work on both sides, which the compiler may fuse with anything but the loss."""

    def step(x: Tensor, y: Tensor, t: Tensor, b: Tensor) -> Tensor:
        return 2 * loss_fn(x.tanh(), y.tanh(), t.exp(), b, positive_offset=1) + 1

    inputs = make_inputs(*SHAPE, torch.float32)._replace(logit_scale=torch.tensor(2.3))
    assert_same(compiled_step(step, "inductor")(inputs), differentiate(step, inputs), f"inductor {SHAPE}", 3e-6)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None])
def test_one_compilation_serves_every_batch_size(compiler: str, dynamic: bool | None) -> None:
    """Dynamic from the start: once. Left to the compiler: once for the first size, once for all others."""
    counter = CompileCounterWithBackend(compiler)
    step = compiled_step(loss_fn, counter, dynamic=dynamic)
    # M ≠ N, multiples of nothing, and beyond one 1024-block.
    for M, N in ((6, 9), (11, 7), (1030, 13), (5, 8)):
        inputs = make_inputs(M, N, 4, torch.float32)
        assert_same(step(inputs), differentiate(loss_fn, inputs), f"{compiler} dynamic={dynamic} {(M, N)}", 0.0)
    assert counter.frame_count <= (1 if dynamic else 2), counter.frame_count


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_with_ids_weights_and_float_scalars(dynamic: bool) -> None:
    @partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def step(x: Tensor, y: Tensor, t: float, b: float, **pairs: Tensor) -> Tensor:
        return loss_fn(x, y, t, b, **pairs, reduction="mean")

    for M, N, t in ((6, 9, 10.0), (11, 7, 12.5)):
        x, y, *_ = make_inputs(M, N, 4, torch.float32)
        pairs = {**pairs_of("ids", M, N), "image_weights": torch.rand(M), "text_weights": torch.rand(N)}
        assert torch.equal(step(x, y, t, -t, **pairs), loss_fn(x, y, t, -t, **pairs, reduction="mean"))


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
def test_one_tensor_as_both_arguments(compiler: str | None) -> None:
    """Under torch.compile one tensor as two arguments has been seen to get half its gradient (pytorch#183604)."""

    def step(x: Tensor, t: Tensor) -> Tensor:
        return loss_fn(x, x, t, -10.0)

    x, _, t, _ = make_inputs(*SHAPE, torch.float64)
    x.requires_grad_()
    run = step if compiler is None else torch.compile(step, backend=compiler, fullgraph=True)
    (dx,) = torch.autograd.grad(run(x, t), x)
    right = gold(Inputs(x.detach(), x.detach(), t, torch.tensor(-10.0)))
    assert relative_l2(dx, right.image_features + right.text_features) < 1e-12


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_the_module_compiles(compiler: str) -> None:
    x, y, *_ = make_inputs(*SHAPE, torch.float32)
    for bias in (-10.0, None):
        module = SigmoidLoss(10.0, bias, backend="eager")
        parameters = list(module.parameters())
        right = [module(x, y), *torch.autograd.grad(module(x, y), parameters)]
        loss = torch.compile(module, backend=compiler, fullgraph=True)(x, y)
        for value, expected in zip([loss, *torch.autograd.grad(loss, parameters)], right, strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_under_autocast_and_without_grad(compiler: str) -> None:
    inputs = make_inputs(*SHAPE, torch.float32)
    step = torch.compile(loss_fn, backend=compiler, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, right = differentiate(step, inputs), differentiate(loss_fn, inputs)
    assert_same(ours, right, f"autocast {compiler} {SHAPE}", 0.0)
    with torch.no_grad():
        loss = step(*(t.requires_grad_() for t in inputs))
    assert not loss.requires_grad
    assert torch.equal(loss, loss_fn(*inputs))
