"""Peak memory is read right, and rounds are interleaved."""

from __future__ import annotations

import pytest
import torch

from bench.harness import timing

CPU = torch.device("cpu")


@pytest.mark.parametrize("mib", [8, 64, 300])
def test_peak_memory_is_read_right(mib: int) -> None:
    """Allocations on either side of the C library's limit for keeping freed memory, after such a one was freed."""

    def step() -> None:
        torch.ones(mib * 2**20 // 4)

    step()
    # The least of three: other threads of a test process may grow it meanwhile.
    peaks = [peak for peak in (timing.peak_bytes(step, CPU) for _ in range(3)) if peak is not None]
    if not peaks:
        pytest.skip("peak memory cannot be read on this system")
    assert min(peaks) / 2**20 == pytest.approx(mib, rel=0.05, abs=1)


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b", "c")}
    times = timing.time_interleaved(
        steps, CPU, seconds=0, min_rounds=30, setup=lambda name: calls.append(f"before {name}")
    )
    timed = [call for call in calls if "before" not in call]
    assert calls[::2] == [f"before {name}" for name in timed]
    assert all(sorted(timed[i : i + 3]) == ["a", "b", "c"] for i in range(0, 90, 3))
    assert {name: len(t) for name, t in times.items()} == {"a": 30, "b": 30, "c": 30}
    # No step always runs after the same other.
    before_a = [timed[i - 1] for i in range(1, 90) if timed[i] == "a"]
    assert min(before_a.count("b"), before_a.count("c")) >= 8
