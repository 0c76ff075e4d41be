"""A contender that cannot run is shown with its reason, and the others are timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.harness.progress import Progress
from bench.microbenchmark import contenders, measure
from bench.microbenchmark.problems import FROZEN, Problem

CPU = torch.device("cpu")


def test_a_rival_that_cannot_run_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> None:
        raise RuntimeError("no room\nfor this")

    rivals = [
        contenders.Contender("floor", None),
        contenders.Contender("ours (eager)", contenders.eager_loss, ours=True),
        contenders.Contender("broken", broken),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(measure, "contenders_for", lambda *arguments: rivals)
    rows = measure.measure_problem(Problem(16, 8, torch.float32, FROZEN), CPU, 0.0, None, Progress(1))
    assert [(row.contender, row.note) for row in rows][2] == ("broken", "n/a: RuntimeError: no room")
    assert rows[2].ms is None
    assert rows[1].of_full is not None
    assert rows[1].of_full > 0
    monkeypatch.setattr(measure, "contenders_for", lambda *arguments: [rivals[0], replace(rivals[2], ours=True)])
    rows = measure.measure_problem(Problem(16, 8, torch.float32), CPU, 0.0, None, Progress(1))
    assert [(row.contender, row.note) for row in rows] == [("floor", ""), ("broken", "n/a: RuntimeError: no room")]
    assert measure.failure_lines(rows) == []
    assert measure.failure_lines(
        [replace(rows[1], contender="ours (x), graph"), replace(rows[0], contender="ours (x)")]
    ) == ["forward + backward, float32, B = 16, D = 8: ours (x), graph: n/a: RuntimeError: no room"]
    monkeypatch.setattr(measure, "contenders_for", lambda *arguments: [replace(rivals[2], loss=None), rivals[1]])
    monkeypatch.setattr(contenders.GemmFloor, "__call__", broken)
    with pytest.raises(RuntimeError, match="no room"):
        measure.measure_problem(Problem(16, 8, torch.float32), CPU, 0.0, None, Progress(1))


def test_who_fails_beside_the_others_leaves_them_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its warm-up, as when the others' memory leaves no room."""
    calls = []

    def hungry(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no room")
        return contenders.eager_loss(*inputs)

    entrants = [
        contenders.Contender("floor", None),
        contenders.Contender("ours (eager)", contenders.eager_loss, ours=True),
        contenders.Contender("hungry", hungry),
    ]
    rows = measure.measure_contenders(Problem(16, 8, torch.float32), entrants, CPU, 0.0, Progress(1))
    assert [row.rounds for row in rows] == [3, 3, None]
    assert rows[2].note == "n/a: OutOfMemoryError: no room"


def test_the_floor_s_buffers_are_not_there_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    floors = []

    class RecordedFloor(contenders.GemmFloor):
        def __init__(self, *arguments: Any) -> None:
            floors.append(self)
            super().__init__(*arguments)

    def rival(*inputs: torch.Tensor) -> torch.Tensor:
        assert not any(hasattr(floor, name) for floor in floors for name in ("z", "dz", "dx", "dy"))
        return contenders.eager_loss(*inputs)

    monkeypatch.setattr(contenders, "GemmFloor", RecordedFloor)
    monkeypatch.setattr(measure, "GemmFloor", RecordedFloor)
    entrants = [contenders.Contender("floor", None), contenders.Contender("rival", rival)]
    rows = measure.measure_contenders(Problem(16, 8, torch.float32), entrants, CPU, 0.0, Progress(1))
    assert len(floors) == 1
    assert [row.rounds for row in rows] == [3, 3], rows
