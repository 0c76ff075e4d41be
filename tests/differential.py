"""Random calls of the loss against its definition in float64: arguments, backends, modes and kinds of tensors.

    python -m tests.differential --cases 20000 --seed 0

An error of a result is judged by a bound of its own, element by element: what rounding may do to each pair's term,
added up. So nothing is compared with a constant, and no pair hides behind another.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from siglip_kernels import sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import denominator, masses, pair_weights
from tests.kinds import KINDS, ONLY_FLOATING, WITHOUT_GRAD, default_dtype, unwrapped

FEATURES = ("image_features", "text_features")
SCALARS = ("logit_scale", "logit_bias")
IDS, WEIGHTS = ("image_ids", "text_ids"), ("image_weights", "text_weights")
TENSORS = (*FEATURES, *SCALARS, *IDS, *WEIGHTS)
LEAVES = ("parameter", "wrapper subclass")  # what KINDS makes of a tensor without a graph behind it
ROUNDINGS = 16  # of float32 or float64 that a term may have seen, beyond those of its logit


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


@st.composite
def calls(draw: Callable[..., Any]) -> Call:
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    M, N, D = (draw(st.integers(1, most)) for most in one_of((4, 4, 3), (40, 40, 20), (90, 70, 9)))
    dtype = one_of(torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, y = (F.normalize(random(n, D), dim=1).to(dtype) for n in (M, N))
    t, b = one_of((10.0, -10.0), (117.0, -12.9), (0.01, 3.0), (1.5, 0.5))
    arguments: dict[str, Any] = {"image_features": x, "text_features": y}
    for name, value in (("logit_scale", t), ("logit_bias", b)):
        form = one_of("float", "tensor", "tensor", "tensor", "half", "none" if name == "logit_bias" else "tensor")
        scalar_dtype = torch.bfloat16 if form == "half" else one_of(torch.float32, torch.float64, dtype)
        made = torch.full(one_of((), (), (1,), (1, 1)), value, dtype=scalar_dtype)
        arguments[name] = {"float": value, "none": None}.get(form, made)
    arguments |= draw(labels(M, N)) | draw(weights(M, N))
    arguments["reduction"] = one_of("batchmean", "mean", "sum")
    arguments["return_stats"] = one_of(False, False, True)
    given_tensors = [name for name in TENSORS if isinstance(arguments.get(name), Tensor)]
    kinds = {name: one_of("plain", "plain", "plain", *KINDS) for name in given_tensors}
    kinds = {k: v for k, v in kinds.items() if v != "plain" and (k not in IDS + WEIGHTS or v not in ONLY_FLOATING)}
    mode = draw(st.sampled_from(MODE_NAMES))
    if mode in WITHOUT_KINDS:
        kinds = {}
    gradless = {name for name, kind in kinds.items() if kind in WITHOUT_GRAD}
    able = [isinstance(arguments[name], Tensor) and name not in gradless for name in FEATURES + SCALARS]
    wanted = tuple(can and "functional" not in kinds.values() and draw(st.booleans()) for can in able)
    return Call(arguments, kinds, wanted, one_of("cpu", "cpu", "eager", "auto"), mode)


@st.composite
def labels(draw: Callable[..., Any], M: int, N: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(["offset", "offset", "none", "ids", "ignore", "weights", "soft_targets"]))
    offset = draw(st.integers(-M - 1, N + 1))
    if kind in ("offset", "none"):
        return {"positive_offset": offset if kind == "offset" else None}
    dtypes = st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8])
    several = draw(st.integers(1, 9))
    ids = [torch.arange(n).remainder(several).to(draw(dtypes)) for n in (M, N)]
    found: dict[str, Any] = dict(zip(IDS, ids, strict=True))
    if kind == "ignore":
        return {**found, "ignore_ids": True, "positive_offset": offset}
    if kind == "ids":
        return found
    return {**found, "multi_positive": kind, "anchors": draw(st.sampled_from(["both", "images", "texts"]))}


@st.composite
def weights(draw: Callable[..., Any], M: int, N: int) -> dict[str, Any]:
    found = {}
    for name, n in zip(WEIGHTS, (M, N), strict=True):
        if draw(st.integers(0, 2)) == 0:
            dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]))
            found[name] = (
                torch.arange(1, n + 1).remainder(draw(st.integers(2, 5))) * draw(st.sampled_from([1, 3]))
            ).to(dtype)
    return found


# The right result, and how far from it rounding may lead.


@dataclass
class Expected:
    """Of the loss and of each gradient: the value in float64, and the bound on its error in the working precision."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    stats: tuple[Tensor, ...]


def expected(arguments: dict[str, Any], dtype: torch.dtype) -> Expected:
    """``dtype``: of the features as the loss takes them, which is theirs but for autocast."""
    x, y = (arguments[name].to(dtype).double() for name in FEATURES)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scalars = (arguments["logit_scale"], 0.0 if arguments["logit_bias"] is None else arguments["logit_bias"])
    t, b = (float(torch.as_tensor(s, dtype=torch.float64).to(wide)) for s in scalars)
    pairs = PairSpec(
        *(
            arguments.get(name, 0 if name == "positive_offset" else None)
            for name in ("positive_offset", *IDS, *WEIGHTS)
        ),
        arguments.get("ignore_ids", False),
    )
    u, v = pair_weights(pairs, x, y)
    weight, positive = u[:, None] * v, pairs.positive_mask(len(x), len(y))
    products, sizes = x @ y.T, x.abs() @ y.abs().T
    z = t * products + b
    target, factor = positive.double(), torch.ones_like(z)
    if arguments.get("multi_positive") is not None:
        mass = masses(positive, u, v, arguments.get("anchors", "both")).double()
        if arguments["multi_positive"] == "weights":
            factor = torch.where(positive, mass, 1.0)
        else:
            target = torch.where(positive, mass, 0.0)
    ignored = pairs.ignored_mask(*z.shape)
    if ignored is not None:
        factor = factor.masked_fill(ignored, 0.0)
    over = weight * factor / denominator(u, v, arguments["reduction"])
    terms = -over * (target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))
    parts = over * (1 - target) * z.sigmoid(), over * target * (-z).sigmoid()
    dz, size = parts[0] - parts[1], parts[0] + parts[1]

    eps, tiny = torch.finfo(wide).eps, over.abs() * torch.finfo(wide).tiny  # below it exp may be 0
    of_logit = (4 + len(x[0]) ** 0.5) * eps * (abs(t) * sizes + abs(b))  # a sum of D products, rounded at random
    of_dz = size * (of_logit + ROUNDINGS * eps) + tiny
    rounded = of_dz if dtype is wide else of_dz + size * torch.finfo(dtype).eps
    values = {
        "loss": terms.sum(),
        "image_features": t * dz @ y,
        "text_features": t * dz.T @ x,
        "logit_scale": (dz * products).sum(),
        "logit_bias": dz.sum(),
    }
    bounds = {
        "loss": (size * of_logit + terms * ROUNDINGS * eps + tiny).sum(),
        "image_features": abs(t) * rounded @ y.abs(),
        "text_features": abs(t) * rounded.T @ x.abs(),
        "logit_scale": (of_dz * products.abs() + size * sizes * ROUNDINGS * eps).sum(),
        "logit_bias": of_dz.sum(),
    }
    return Expected(values, bounds, _stats(z, positive, weight, ignored))


def _stats(z: Tensor, positive: Tensor, weight: Tensor, ignored: Tensor | None) -> tuple[Tensor, ...]:
    valid = weight != 0 if ignored is None else (weight != 0) & ~ignored
    found: list[Tensor] = []
    for chosen in (z[positive & valid], z[~positive & valid]):
        extremes = (
            (chosen.amin(), chosen.amax()) if len(chosen) else (torch.tensor(torch.inf), torch.tensor(-torch.inf))
        )
        found += [chosen.mean(), *extremes, torch.tensor(len(chosen))]
    return tuple(found)


def wrong(name: str, got: Any, right: Expected, like: Any) -> str | None:
    """What is wrong with a result, if anything; ``like``: the argument whose dtype and shape its gradient has."""
    value, bound = right.values[name], right.bounds[name]
    got = unwrapped(got).detach()
    if isinstance(like, Tensor):
        if got.dtype is not like.dtype or got.shape != like.shape:
            return f"{name}: {got.dtype} {list(got.shape)}, expected {like.dtype} {list(like.shape)}"
        info = torch.finfo(like.dtype)
        bound = bound + info.eps * value.abs() + info.smallest_normal * info.eps
        value = value.clamp(-info.max, info.max)
    error = (got.double().reshape(value.shape).nan_to_num() - value.nan_to_num()).abs()
    if bool((got.isnan() != value.isnan().reshape(got.shape)).any()) or bool(
        (error > bound.nan_to_num(torch.inf)).any()
    ):
        worst = int((error / bound).nan_to_num().argmax())
        got, value, bound = (s.reshape(-1)[worst].item() for s in (got, value, bound))
        return f"{name}[{worst}]: {got!r}, expected {value!r} within {bound:.2e}"
    return None


# How a program may run the loss: each mode returns (loss, gradients of what was wanted, stats or None), or raises.


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
        with warnings.catch_warnings(action="ignore"):
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


def judge(call: Call) -> list[str]:
    """What is wrong with the call's results."""
    loss, grads, stats = MODES[call.mode][1](call)
    dtype = call.arguments["image_features"].dtype
    if call.mode == "autocast" and dtype is not torch.float64:
        dtype = torch.bfloat16
    right = expected(call.arguments, dtype)
    found = [wrong("loss", loss, right, None)]
    if unwrapped(loss).dtype is not (torch.float64 if dtype is torch.float64 else torch.float32):
        found.append(f"loss: {loss.dtype}")
    names = [name for name, is_wanted in zip(FEATURES + SCALARS, call.wanted, strict=True) if is_wanted]
    if grads is not None and call.mode not in ("no_grad", "inference_mode"):
        found += [wrong(n, g, right, call.arguments[n]) for n, g in zip(names, grads, strict=True)]
    for name, got, value in zip(stats._fields if stats is not None else (), stats or (), right.stats, strict=False):
        got = unwrapped(got).double()
        if not torch.allclose(
            got, value.double(), rtol=1e-4, atol=1e-4 if dtype is torch.float64 else 3e-4, equal_nan=True
        ):
            found.append(f"{name}: {got}, expected {value}")
    return [line for line in found if line is not None]


def search(cases: int, seed: int, seen: collections.Counter[str] | None = None, shrink: bool = True) -> None:
    """An error with the smallest call found that goes wrong, or with the first one."""
    phases = [phase for phase in hypothesis.Phase if shrink or phase is hypothesis.Phase.generate]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls())
    def run(call: Call) -> None:
        if seen is not None:
            seen[call.mode] += 1
            seen.update(f"kind: {kind}" for kind in call.kinds.values())
        found = judge(call)
        assert not found, f"{call}: {'; '.join(found)}"

    run()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the calls are small
    begin, seen = time.perf_counter(), collections.Counter[str]()
    for seed in itertools.count(options.seed):  # a thousand at a time, so that what Dynamo keeps does not grow
        left = options.cases - 1000 * (seed - options.seed)
        if left <= 0:
            break
        search(min(left, 1000), seed, seen)
        print(f"seed {seed}: fine, {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    kinds = {name: n for name, n in seen.items() if name.startswith("kind")}
    print(f"{seen.total() - sum(kinds.values()):,} calls, no mismatch; {dict(seen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
