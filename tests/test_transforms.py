"""Other ways to differentiate than backward: the true derivative or an error, never a dropped tangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import functional
from torch.utils._pytree import tree_leaves

from siglip_kernels import sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.reference import sigmoid_loss_reference

M, N, D = 7, 6, 4
GENERATOR = torch.Generator().manual_seed(0)
X, V = (torch.randn(M, D, generator=GENERATOR) for _ in "xv")
Y = torch.randn(N, D, generator=GENERATOR)
SCALE, BIAS = torch.tensor(2.0), torch.tensor(-1.0)
Loss = Callable[..., Tensor]


def by(function: Any, **arguments: Any) -> Loss:
    """The loss of one or two arguments; the others are fixed."""
    return lambda x, scale=SCALE, bias=BIAS, y=Y: function(x, y, scale, bias, **arguments)


REFERENCE = by(sigmoid_loss_reference)


def tangent(loss: Loss, place: str) -> Tensor | None:
    """Of the loss, where the argument ``place`` has one; None if it was dropped."""
    with forward_ad.dual_level():
        values = {"x": X, "y": Y, "scale": SCALE, "bias": BIAS}
        dual = forward_ad.make_dual(values[place], torch.ones_like(values[place]))
        out = loss(dual) if place == "x" else loss(X, **{place: dual})
        return forward_ad.unpack_dual(out).tangent


def twice(loss: Loss, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(x), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)


def penalty(loss: Loss, x: Tensor) -> Any:
    """A gradient penalty: the second derivative is a part of the gradient, and missed if it is dropped."""
    x = x.clone().requires_grad_()
    value = loss(x)
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    return torch.autograd.grad(value + dx.square().sum(), x)


def batched(loss: Loss, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x, torch.tensor([1.0, -2.0, 3.0]), is_grads_batched=True)


def repeated(loss: Loss, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    value = loss(x)
    return [torch.autograd.grad(value, x, grad, retain_graph=True) for grad in torch.tensor([1.0, -2.0, 3.0])]


WAYS: dict[str, Callable[[Loss], Any]] = {
    "forward mode, images": lambda f: tangent(f, "x"),
    "forward mode, texts": lambda f: tangent(f, "y"),
    "forward mode, scale": lambda f: tangent(f, "scale"),
    "forward mode, bias": lambda f: tangent(f, "bias"),
    "func.grad": lambda f: torch.func.grad(f)(X),
    "func.grad_and_value": lambda f: torch.func.grad_and_value(f)(X),
    "func.vjp": lambda f: torch.func.vjp(f, X)[1](torch.tensor(2.0)),
    "func.jvp": lambda f: torch.func.jvp(f, (X,), (V,)),
    "func.linearize": lambda f: torch.func.linearize(f, X)[1](V),
    "func.jacrev": lambda f: torch.func.jacrev(f)(X),
    "func.jacfwd": lambda f: torch.func.jacfwd(f)(X),
    "func.hessian": lambda f: torch.func.hessian(f)(X),
    "func.vmap": lambda f: torch.vmap(f)(torch.stack([X, V])),
    "func.vmap of grad": lambda f: torch.vmap(torch.func.grad(f))(torch.stack([X, V])),
    "func.vmap over the scale": lambda f: torch.vmap(lambda s: f(X, s))(torch.tensor([1.0, 2.0])),
    "func.functionalize": lambda f: torch.func.functionalize(f)(X),
    "functional.jacobian": lambda f: functional.jacobian(f, X),
    "functional.jacobian, vectorized": lambda f: functional.jacobian(f, X, vectorize=True),
    "functional.jacobian, forward": lambda f: functional.jacobian(f, X, vectorize=True, strategy="forward-mode"),
    "functional.hessian": lambda f: functional.hessian(f, X),
    "functional.jvp": lambda f: functional.jvp(f, X, V),
    "functional.vjp": lambda f: functional.vjp(f, X),
    "functional.hvp": lambda f: functional.hvp(f, X, V),
    "create_graph": lambda f: twice(f, X),
    "gradient penalty": lambda f: penalty(f, X),
    "batched gradients": lambda f: batched(f, X),
    "repeated gradients": lambda f: repeated(f, X),
}
# What is supported; every other way raises.
RIGHT = (
    *("functional.jacobian", "functional.jacobian, vectorized", "functional.vjp"),
    *("batched gradients", "repeated gradients"),
)
# AOTAutograd keeps no second derivative of an argument that is a view, and says nothing: of torch's own operations too.
LOST_BY_TORCH = ("functional.hessian",)


def assert_right_or_refused(way: str, run: Callable[[], Any]) -> None:
    """The value that the reference gives, or a RuntimeError where the way is not supported."""
    if way not in RIGHT:
        try:
            got = run()
        except RuntimeError:
            return
    else:
        got = run()
    right, leaves = tree_leaves(WAYS[way](REFERENCE)), tree_leaves(got)
    assert len(leaves) == len(right)
    for value, expected in zip(leaves, right, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_eager(way: str, backend: str) -> None:
    loss = by(sigmoid_loss, backend=backend)
    if way in RIGHT:
        assert_right_or_refused(way, lambda: WAYS[way](loss))
        return
    with pytest.raises(
        RuntimeError, match=r"sigmoid_loss (cannot be differentiated twice|does not run|has no forward)"
    ):
        WAYS[way](loss)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_inside_a_compiled_function(way: str, compiler: str) -> None:
    if compiler != "eager" and way in LOST_BY_TORCH:
        pytest.skip("lost by AOTAutograd, of any operation")
    loss = by(sigmoid_loss, backend="cpu")
    compiled = torch.compile(lambda: WAYS[way](loss), backend=compiler)
    assert_right_or_refused(way, compiled)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_of_a_compiled_function(way: str, compiler: str) -> None:
    if compiler != "eager" and way in LOST_BY_TORCH:
        pytest.skip("lost by AOTAutograd, of any operation")
    compiled = torch.compile(by(sigmoid_loss, backend="cpu"), backend=compiler)
    assert_right_or_refused(way, lambda: WAYS[way](compiled))


@pytest.mark.parametrize("way", ["forward mode, images", "func.jvp", "func.grad", "create_graph", "gradient penalty"])
def test_of_a_function_compiled_by_inductor(way: str) -> None:
    compiled = torch.compile(by(sigmoid_loss, backend="cpu"))
    assert_right_or_refused(way, lambda: WAYS[way](compiled))


def test_a_dual_level_without_tangents_is_no_obstacle() -> None:
    loss = by(sigmoid_loss, backend="cpu")
    with forward_ad.dual_level():
        assert torch.equal(loss(X), by(sigmoid_loss, backend="cpu")(X))
    x = X.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss(x), x)
    with forward_ad.dual_level():
        assert torch.equal(torch.autograd.grad(loss(x), x)[0], right)


@pytest.mark.parametrize("way", ["vmap", "grad", "functionalize"])
def test_loss_and_grads_has_no_transforms_either(way: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        getattr(torch.func, way)(lambda x: sigmoid_loss_and_grads(x, Y, SCALE, BIAS).loss)(
            torch.stack([X, V]) if way == "vmap" else X
        )
