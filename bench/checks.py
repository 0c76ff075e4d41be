"""What a table of gradient checks does not see: repeats, unwritten memory, graphs, synchronisation, 2³¹ pairs.

Each check takes a backend, a device and a dtype, and returns what is wrong, in words; nothing when nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch

from bench import accuracy
from siglip_kernels import sigmoid_loss
from siglip_kernels.loss import Backend
from siglip_kernels.testing import COLUMNS, LIMITS, PAIRS, Grads, Inputs, differentiate, make_inputs

# 1000 and 3000 are multiples of no tile; 768 is SigLIP's width.
SHAPE = (1000, 3000, 768)
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
    shape: tuple[int, int, int] = (300, 500, 64),
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


def many_pairs(backend: str, device: torch.device, dtype: torch.dtype, B: int = 65_536, D: int = 64) -> list[str]:
    """B² pairs, by default more than a 32-bit index counts, against float64 on a sample of rows."""
    inputs = make_inputs(B, B, D, dtype, device=device, drawn_on=device)
    gold = accuracy.gold(inputs)
    leaves = Inputs(*(t.requires_grad_() for t in inputs))
    loss = sigmoid_loss(*leaves, backend=cast(Backend, backend))
    # Times B, as a gradient scaler would, lest float16 underflow.
    loss.backward(torch.full_like(loss, B))
    gold = gold._replace(dx=B * gold.dx, dy=B * gold.dy)
    limits = {"loss_error": LIMITS[dtype].loss, "dx_error": LIMITS[dtype].features, "dy_error": LIMITS[dtype].features}
    errors = accuracy.errors(gold, loss, leaves)
    return [
        f"{name} {errors[name]} > {limit:.2e}"
        for name, limit in limits.items()
        if not (value := errors[name]) or not value <= limit
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
