"""What a table of gradient checks does not see: repeats, unwritten memory, graphs, synchronisation, 2³¹ pairs.

Each check takes a backend, a device and a dtype, and returns what is wrong, in words; nothing when nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bench.microbenchmark import accuracy
from siglip_kernels import sigmoid_loss
from siglip_kernels.loss import Backend
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import (
    COLUMNS,
    LIMITS,
    PAIRS,
    Grads,
    Inputs,
    differentiate,
    gold,
    make_inputs,
    relative_l2,
    scalar_terms,
)

# 1000 and 3000 are multiples of no tile; 768 is SigLIP's width.
SHAPE = (1000, 3000, 768)
SMALL_SHAPE = (300, 500, 64)
MANY_PAIRS_D = 64
# Of a logit: relative, and of the scale, by which an inner product's rounding grows.
LOGIT_LIMIT = 3e-6
REPEATS = 20


def repeats(backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE) -> list[str]:
    """The same inputs give the same bits, whatever the memory held before."""
    inputs = make_inputs(*shape, dtype, "trained", device=device)
    with poisoned_memory():
        first = _run(backend, inputs)
    return [
        f"repeat {repeat}: {name} differs"
        for repeat in range(REPEATS)
        for name in _differing(_run(backend, inputs), first)
    ]


def graph_replay(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE
) -> list[str]:
    """Forward and backward captured once; replayed on other inputs, also after the caching allocator was busy."""
    leaves = [t.requires_grad_() for t in make_inputs(*shape, dtype, "trained", device=device)]
    call = partial(sigmoid_loss, *leaves, positive_offset=3, backend=cast(Backend, backend))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(call(), leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call()
        captured = Grads(loss, *torch.autograd.grad(loss, leaves))
    wrong = []
    for seed in (1, 2):
        other = make_inputs(*shape, dtype, "trained", device=device, seed=seed)
        with torch.no_grad():
            for leaf, value in zip(leaves, other, strict=True):
                leaf.copy_(value)
        torch.full((1 << 26,), float("nan"), device=device)
        graph.replay()
        names = _differing(captured, _run(backend, other, positive_offset=3))
        wrong += [f"replay on inputs {seed}: {name} differs from an eager launch" for name in names]
    return wrong


def no_synchronisation(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[str] = tuple(PAIRS),
    shape: tuple[int, int, int] = SMALL_SHAPE,
) -> list[str]:
    """Neither forward nor backward waits for the device, whatever the pairs."""
    wrong = []
    for name in kinds:
        leaves = [t.requires_grad_() for t in make_inputs(*shape, dtype, device=device)]
        call = partial(sigmoid_loss, *leaves, **PAIRS[name](*shape[:2], device), backend=cast(Backend, backend))
        call().backward()  # kernels are built and loaded by the first call
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call().backward()
        except RuntimeError as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return wrong


def logit_stats(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[str] = tuple(PAIRS),
    shape: tuple[int, int, int] = SHAPE,
) -> list[str]:
    """``return_stats``, whatever the pairs, against the logits written out in float64."""
    inputs = make_inputs(*shape, dtype, "trained", device=device)
    limit, wrong = LOGIT_LIMIT * float(inputs.logit_scale), []
    for kind in kinds:
        pairs = PAIRS[kind](*shape[:2], device)
        leaves = [t.detach().requires_grad_() for t in inputs]
        with poisoned_memory():
            _, found = sigmoid_loss(*leaves, **pairs, backend=cast(Backend, backend), return_stats=True)
        _, right = sigmoid_loss_reference(*(t.double() for t in inputs), **pairs, return_stats=True)
        wrong += [
            f"{kind}: {name} {float(value):.7g}, expected {float(expected):.7g}"
            for name, value, expected in zip(right._fields, found, right, strict=True)
            if not _close(value, expected, 0.0 if name.endswith("count") else limit)
        ]
    return wrong


def _close(value: Tensor, expected: Tensor, limit: float) -> bool:
    relative = LOGIT_LIMIT if limit else 0.0
    return bool(torch.isclose(value.double(), expected.double(), rtol=relative, atol=limit, equal_nan=True))


def many_pairs(
    backend: str, device: torch.device, dtype: torch.dtype, B: int = 65_536, D: int = MANY_PAIRS_D
) -> list[str]:
    """B² pairs, by default more than a 32-bit index counts, against float64 on a sample of rows."""
    inputs = make_inputs(B, B, D, dtype, device=device, drawn_on=device)
    sampled = accuracy.gold(inputs)
    leaves = Inputs(*(t.requires_grad_() for t in inputs))
    loss = sigmoid_loss(*leaves, backend=cast(Backend, backend))
    # Times B, as a gradient scaler would, lest float16 underflow.
    loss.backward(torch.full_like(loss, B))
    sampled = sampled._replace(dx=B * sampled.dx, dy=B * sampled.dy)
    limits = {"loss_error": LIMITS[dtype].loss, "dx_error": LIMITS[dtype].features, "dy_error": LIMITS[dtype].features}
    errors = accuracy.errors(sampled, loss, leaves)
    return [
        f"{name} {errors[name]} > {limit:.2e}"
        for name, limit in limits.items()
        if not (value := errors[name]) or not value <= limit
    ]


def against_float64(loss_fn: Callable[..., Tensor], inputs: Inputs, **pairs: Any) -> list[str]:
    """The loss and every gradient, within the fixed limits of the features' dtype."""
    found, right = differentiate(loss_fn, inputs, **pairs), gold(inputs, **pairs)
    terms, limits = scalar_terms(inputs, **pairs), LIMITS[inputs.image_features.dtype]
    errors = [relative_l2(value, expected) for value, expected in zip(found[:3], right[:3], strict=True)]
    errors += [
        float((value - expected).abs()) / total
        for value, expected, total in zip(found[3:], right[3:], terms, strict=True)
    ]
    bounds = limits.loss, *[limits.features] * 2, *[limits.scalars] * 2
    return [
        f"{name} errs by {error:.1e}"
        for name, error, bound in zip(COLUMNS, errors, bounds, strict=True)
        if not error <= bound
    ]


@contextmanager
def poisoned_memory(*, warn_only: bool = True) -> Iterator[None]:
    """Uninitialised floating memory is NaN, and integers are their largest, so that an unwritten element shows.

    Without ``warn_only`` an algorithm that is not deterministic raises; cuBLAS then wants CUBLAS_WORKSPACE_CONFIG set.
    """
    deterministic: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]


def _run(backend: str, inputs: Inputs, **pairs: Any) -> Grads:
    return differentiate(partial(sigmoid_loss, backend=cast(Backend, backend)), inputs, **pairs)


def _differing(values: Grads, expected: Grads) -> list[str]:
    """NaN differs from everything, so that poison never passes."""
    return [name for name, v, e in zip(COLUMNS, values, expected, strict=True) if not torch.equal(v, e)]
