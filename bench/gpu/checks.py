"""What gradient checks do not cover: determinism, unwritten memory, CUDA graphs, host synchronisation, 2³¹ pairs.

Each check takes a backend, a device and a dtype, and returns a list of failures, empty if it passed.
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
OVERFLOW_D = 64
# Of a logit: relative; absolute when multiplied by the scale, since rounding of an inner product grows with it.
LOGIT_LIMIT = 3e-6
REPEATS = 20


def bitwise_repeatable(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE
) -> list[str]:
    """The same inputs give the same bits, whatever was in the memory before."""
    inputs = make_inputs(*shape, dtype, "trained", device=device)
    with poisoned_memory():
        first = _differentiate(backend, inputs)
    return [
        f"repeat {repeat}: {name} differs"
        for repeat in range(REPEATS)
        for name in _mismatches(_differentiate(backend, inputs), first)
    ]


def cuda_graph_replay(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] = SHAPE
) -> list[str]:
    """Forward and backward captured once, then replayed on other inputs, also after the caching allocator was used."""
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
    failures = []
    for seed in (1, 2):
        other = make_inputs(*shape, dtype, "trained", device=device, seed=seed)
        with torch.no_grad():
            for leaf, value in zip(leaves, other, strict=True):
                leaf.copy_(value)
        torch.full((1 << 26,), float("nan"), device=device)
        graph.replay()
        names = _mismatches(captured, _differentiate(backend, other, positive_offset=3))
        failures += [f"replay on inputs {seed}: {name} differs from an eager launch" for name in names]
    return failures


def no_host_sync(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[str] = tuple(PAIRS),
    shape: tuple[int, int, int] = SMALL_SHAPE,
) -> list[str]:
    """Neither forward nor backward synchronises with the device, for any kind of pairs."""
    failures = []
    for name in kinds:
        leaves = [t.requires_grad_() for t in make_inputs(*shape, dtype, device=device)]
        call = partial(sigmoid_loss, *leaves, **PAIRS[name](*shape[:2], device), backend=cast(Backend, backend))
        call().backward()  # the first call builds and loads kernels
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call().backward()
        except RuntimeError as error:
            failures.append(f"{name}: {str(error).splitlines()[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return failures


def logit_stats(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[str] = tuple(PAIRS),
    shape: tuple[int, int, int] = SHAPE,
) -> list[str]:
    """``return_stats`` for each kind of pairs, against explicit float64 logits."""
    inputs = make_inputs(*shape, dtype, "trained", device=device)
    limit, failures = LOGIT_LIMIT * float(inputs.logit_scale), []
    for kind in kinds:
        pairs = PAIRS[kind](*shape[:2], device)
        leaves = [t.detach().requires_grad_() for t in inputs]
        with poisoned_memory():
            _, actual = sigmoid_loss(*leaves, **pairs, backend=cast(Backend, backend), return_stats=True)
        _, reference = sigmoid_loss_reference(*(t.double() for t in inputs), **pairs, return_stats=True)
        failures += [
            f"{kind}: {name} {float(value):.7g}, expected {float(expected):.7g}"
            for name, value, expected in zip(reference._fields, actual, reference, strict=True)
            if not _close(value, expected, 0.0 if name.endswith("count") else limit)
        ]
    return failures


def _close(value: Tensor, expected: Tensor, limit: float) -> bool:
    relative = LOGIT_LIMIT if limit else 0.0
    return bool(torch.isclose(value.double(), expected.double(), rtol=relative, atol=limit, equal_nan=True))


def index_overflow(
    backend: str, device: torch.device, dtype: torch.dtype, B: int = 65_536, D: int = OVERFLOW_D
) -> list[str]:
    """B² pairs, by default more than a 32-bit index can count, against float64 on a sample of rows."""
    inputs = make_inputs(B, B, D, dtype, device=device, drawn_on=device)
    gold_rows = accuracy.sampled_gold(inputs)
    leaves = Inputs(*(t.requires_grad_() for t in inputs))
    loss = sigmoid_loss(*leaves, backend=cast(Backend, backend))
    # Scaled by B, as a GradScaler would, so that float16 does not underflow.
    loss.backward(torch.full_like(loss, B))
    gold_rows = gold_rows._replace(dx=B * gold_rows.dx, dy=B * gold_rows.dy)
    limits = {"loss_error": LIMITS[dtype].loss, "dx_error": LIMITS[dtype].features, "dy_error": LIMITS[dtype].features}
    errors = accuracy.sampled_errors(gold_rows, loss, leaves)
    return [
        f"{name} {errors[name]} > {limit:.2e}"
        for name, limit in limits.items()
        if not (value := errors[name]) or not value <= limit
    ]


def against_float64(loss_fn: Callable[..., Tensor], inputs: Inputs, **pairs: Any) -> list[str]:
    """The loss and every gradient, within the fixed limits of the features' dtype."""
    actual, reference = differentiate(loss_fn, inputs, **pairs), gold(inputs, **pairs)
    terms, limits = scalar_terms(inputs, **pairs), LIMITS[inputs.image_features.dtype]
    errors = [relative_l2(value, expected) for value, expected in zip(actual[:3], reference[:3], strict=True)]
    errors += [
        float((value - expected).abs()) / total
        for value, expected, total in zip(actual[3:], reference[3:], terms, strict=True)
    ]
    bounds = limits.loss, *[limits.features] * 2, *[limits.scalars] * 2
    return [
        f"{name} errs by {error:.1e}"
        for name, error, bound in zip(COLUMNS, errors, bounds, strict=True)
        if not error <= bound
    ]


@contextmanager
def poisoned_memory(*, warn_only: bool = True) -> Iterator[None]:
    """Fill uninitialised memory, floats with NaN and integers with their maximum, so that an unwritten element shows.

    Without ``warn_only`` a nondeterministic algorithm raises, and cuBLAS needs CUBLAS_WORKSPACE_CONFIG.
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


def _differentiate(backend: str, inputs: Inputs, **pairs: Any) -> Grads:
    return differentiate(partial(sigmoid_loss, backend=cast(Backend, backend)), inputs, **pairs)


def _mismatches(values: Grads, expected: Grads) -> list[str]:
    """Names of the values that differ in any bit. NaN differs from NaN, so poisoned memory never passes."""
    return [name for name, v, e in zip(COLUMNS, values, expected, strict=True) if not torch.equal(v, e)]
