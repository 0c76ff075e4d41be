"""How a program may run the loss: each mode returns (loss, gradients of what was wanted, stats or None), or raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from siglip_kernels import sigmoid_loss, sigmoid_loss_and_grads
from tests.kinds import KINDS, default_dtype, unwrapped

FEATURES = ("image_features", "text_features")
SCALARS = ("logit_scale", "logit_bias")
IDS, WEIGHTS = ("image_ids", "text_ids"), ("image_weights", "text_weights")
TENSORS = (*FEATURES, *SCALARS, *IDS, *WEIGHTS)
LEAVES = ("parameter", "wrapper subclass")  # what KINDS makes of a tensor without a graph behind it


@dataclass(frozen=True)
class Call:
    """One random call."""

    arguments: dict[str, Any]
    kinds: dict[str, str]  # of TENSORS that are not plain
    wanted: tuple[bool, ...]  # of the features and scalars: requires grad
    backend: str
    mode: str

    def __str__(self) -> str:
        shown = {k: f"{v.dtype} {list(v.shape)}" if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        return f"{self.backend}, {self.mode}, wanted {self.wanted}, kinds {self.kinds}: {shown}"


Result = tuple[Any, Sequence[Any], Any]


def run_plain(call: Call) -> Result:
    return differentiated(call, prepared(call))


def differentiated(
    call: Call, made: tuple[dict[str, Any], list[Tensor]], function: Callable[..., Any] = sigmoid_loss
) -> Result:
    """``made``: as from ``prepared``."""
    arguments, leaves = made
    found = function(**arguments, backend=call.backend)
    loss, stats = found if call.arguments["return_stats"] else (found, None)
    return loss, torch.autograd.grad(loss, leaves) if leaves else (), stats


def prepared(call: Call) -> tuple[dict[str, Any], list[Tensor]]:
    """The arguments, of their kinds, and the leaves whose gradients are wanted."""
    arguments, leaves = dict(call.arguments), []
    wanted = dict(zip(FEATURES + SCALARS, call.wanted, strict=True))
    for name in TENSORS:
        t, kind = arguments.get(name), call.kinds.get(name)
        if not isinstance(t, Tensor):
            continue
        leaf = KINDS[kind](t.clone()) if kind in LEAVES else t.clone()
        if wanted.get(name):
            leaves.append(leaf.requires_grad_())
        arguments[name] = KINDS[kind](leaf) if kind not in (None, *LEAVES) else leaf
    return arguments, leaves


def run_without_grad(context: Callable[[], Any]) -> Callable[[Call], Result]:
    def run(call: Call) -> Result:
        with context():
            found = sigmoid_loss(**prepared(call)[0], backend=call.backend)
        loss, stats = found if call.arguments["return_stats"] else (found, None)
        assert not loss.requires_grad
        return loss, (), stats

    return run


def run_within(context: Callable[[], Any]) -> Callable[[Call], Result]:
    def run(call: Call) -> Result:
        made = prepared(call)
        with context():
            return differentiated(call, made)

    return run


def run_loss_and_grads(call: Call) -> Result:
    """Every gradient, wanted or not."""
    arguments, _ = prepared(call)
    found = sigmoid_loss_and_grads(**arguments, backend=call.backend)
    grads, stats = found if call.arguments["return_stats"] else (found, None)
    loss, *others = grads
    chosen = [grad for grad, is_wanted in zip(others, call.wanted, strict=True) if is_wanted]
    return loss, chosen, stats


def run_checkpointed(call: Call) -> Result:
    function = partial(checkpoint, sigmoid_loss, use_reentrant=False)
    return differentiated(call, prepared(call), function)


def run_batched(call: Call) -> Result:
    """Three upstream gradients at once; the first is 1."""
    arguments, leaves = prepared(call)
    arguments["return_stats"] = False
    loss = sigmoid_loss(**arguments, backend=call.backend)
    upstream = torch.tensor([1.0, -1.0, 0.0], dtype=loss.dtype)
    grads = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True) if leaves else ()
    for grad in grads:
        assert torch.equal(-grad[0], grad[1]), "the second of three upstream gradients"
    return loss, [grad[0] for grad in grads], None


def run_twice(call: Call) -> Result:
    """The graph is kept, and what it gave the first time is as it was."""
    arguments, leaves = prepared(call)
    arguments["return_stats"] = False
    loss = sigmoid_loss(**arguments, backend=call.backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True) if leaves else ()
    kept = [t.clone() for t in first]
    again = torch.autograd.grad(loss, leaves) if leaves else ()
    assert all(map(torch.equal, map(unwrapped, first), map(unwrapped, again)))
    assert all(map(torch.equal, map(unwrapped, first), map(unwrapped, kept)))
    return loss, first, None


def run_fake(call: Call) -> Result:
    """Without data: shapes and dtypes alone; zeros of them are returned, which nothing but those is asked of."""
    arguments, _ = prepared(call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        leaves = [made[name] for name, is_wanted in zip(FEATURES + SCALARS, call.wanted, strict=True) if is_wanted]
        made["return_stats"] = False
        loss = sigmoid_loss(**made, backend=call.backend)
        grads = torch.autograd.grad(loss, leaves) if leaves else ()
    real = run_plain(call)
    for fake, value in zip([loss, *grads], [real[0], *real[1]], strict=True):
        assert (fake.shape, fake.dtype) == (value.shape, value.dtype)
    return real


def run_traced(trace: Callable[[Any, tuple[Tensor, ...]], Any]) -> Callable[[Call], Result]:
    """Traced on other features and scalars, of the same shapes."""

    def run(call: Call) -> Result:
        arguments, leaves = prepared(call)
        inputs = {k: arguments.pop(k) for k in FEATURES + SCALARS if isinstance(arguments[k], Tensor)}
        arguments["return_stats"] = False

        def function(*traced: Tensor) -> Tensor:
            loss: Tensor = sigmoid_loss(**dict(zip(inputs, traced, strict=True)), **arguments, backend=call.backend)
            return loss

        other = tuple(t.detach().roll(1, 0).neg() if t.dim() == 2 else t.detach() / 2 for t in inputs.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = trace(function, other)
        loss = traced(*inputs.values())
        return loss, torch.autograd.grad(loss, leaves) if leaves else (), None

    return run


def compiled_by(backend: str) -> Callable[[Any, tuple[Tensor, ...]], Any]:
    def trace(function: Any, other: tuple[Tensor, ...]) -> Any:
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        compiled(*other)
        return compiled

    return trace


class _PassDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _PassFunction(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def run_refused(differentiate: Callable[[Any, Tensor], Any]) -> Callable[[Call], Result]:
    """A way to differentiate that is not supported: it must raise, whatever else the call is."""

    def run(call: Call) -> Result:
        arguments, _ = prepared(call)
        arguments["return_stats"] = False
        del arguments["image_features"]
        x = call.arguments["image_features"].clone()
        with pytest.raises(RuntimeError, match="sigmoid_loss"):
            differentiate(lambda x: sigmoid_loss(x, **arguments, backend=call.backend), x)
        return run_plain(call)

    return run


def _dual(function: Any, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def _second(function: Any, x: Tensor) -> None:
    x.requires_grad_()
    (dx,) = torch.autograd.grad(function(x), x, create_graph=True)
    torch.autograd.grad(dx.sum(), x)


MODES: dict[str, tuple[int, Callable[[Call], Result]]] = {  # how often, against the others, and how
    "plain": (12, run_plain),
    "no_grad": (3, run_without_grad(torch.no_grad)),
    "inference_mode": (3, run_without_grad(torch.inference_mode)),
    "default dtype float64": (3, run_within(lambda: default_dtype(torch.float64))),
    "default dtype bfloat16": (3, run_within(lambda: default_dtype(torch.bfloat16))),
    "default device": (3, run_within(lambda: torch.device("meta"))),
    "autocast": (4, run_within(lambda: torch.autocast("cpu", dtype=torch.bfloat16))),
    "dispatch mode": (3, run_within(_PassDispatch)),
    "function mode": (3, run_within(_PassFunction)),
    "loss_and_grads": (4, run_loss_and_grads),
    "checkpoint": (2, run_checkpointed),
    "batched gradients": (3, run_batched),
    "kept graph": (3, run_twice),
    "fake": (3, run_fake),
    "make_fx": (2, run_traced(lambda f, other: make_fx(f)(*other))),
    "make_fx, pre-dispatch": (2, run_traced(lambda f, other: make_fx(f, pre_dispatch=True)(*other))),
    "jit.trace": (1, run_traced(lambda f, other: torch.jit.trace(f, other, check_trace=False))),
    "compile, eager": (1, run_traced(compiled_by("eager"))),
    "compile, aot_eager": (1, run_traced(compiled_by("aot_eager"))),
    "forward mode": (2, run_refused(_dual)),
    "func.grad": (1, run_refused(lambda f, x: torch.func.grad(f)(x))),
    "func.vmap": (1, run_refused(lambda f, x: torch.vmap(f)(x[None]))),
    "second derivative": (2, run_refused(_second)),
}


MODE_NAMES = [name for name, (often, _) in MODES.items() for _ in range(often)]
WITHOUT_KINDS = [
    name for name in MODES if name.startswith(("make_fx", "jit", "compile", "fake", "func", "default device"))
]
