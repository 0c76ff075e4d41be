"""Times and peak memory on the CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20


class Spread(NamedTuple):
    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def time_once(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run that starts on an idle device: by CUDA events, launches included, or by perf_counter."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize(device)
        events[0].record()
        step()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1000
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def time_interleaved(
    steps: Mapping[Any, Callable[[], Any]],
    device: torch.device,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
    setup: Callable[[Any], Any] = lambda name: None,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[Any, list[float]]:
    """Seconds of each step by round: every step runs once a round, so that all see the same state of the machine.

    The order is drawn anew for each round: on a device bound by its power a step inherits the clocks that the one
    before left, which must not always be the same. ``setup`` runs untimed before each step. The caller has warmed up
    the steps. A round that would not end within ``seconds`` is not started.
    """
    times: dict[Any, list[float]] = {name: [] for name in steps}
    names, order = list(steps), random.Random(0)
    start = time.perf_counter()
    for done in range(max_rounds):
        spent = time.perf_counter() - start
        if done >= min_rounds and spent * (done + 1) > seconds * done:
            break
        on_round(done)
        order.shuffle(names)
        for name in names:
            setup(name)
            times[name].append(time_once(steps[name], device))
    return times


def free_cached_memory(device: torch.device) -> None:
    """Return unused memory to the device, so that one contender does not reduce what the next can allocate."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Peak bytes of ``step`` above what was allocated before; None where that cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # Freed memory that the allocator keeps would hide what the step allocates: return it first.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    clear.write_text("5")
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
