"""Clocks and peak memory, of the CPU and of CUDA devices."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20


class Spread(NamedTuple):
    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    steps: dict[str, Callable[[], None]],
    device: torch.device,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 50,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of each step, by round: every step once a round, so that all share the machine's moods.

    The caller has warmed the steps up. Rounds go on until ``seconds`` are spent.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        progress(done)
        for name, step in steps.items():
            synchronize(device)
            begin = time.perf_counter()
            step()
            synchronize(device)
            times[name].append(time.perf_counter() - begin)
    return times


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that ``step`` takes at its peak above what is held before it; None where that cannot be read."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    # Freed memory that the allocator holds on to would hide what the step takes: give it back first.
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
