"""One problem measured: every contender warmed up, its memory and errors read, then timed beside the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from bench.harness.progress import Progress
from bench.harness.timing import MIB, interleaved, peak_bytes, release, seconds_of, spread
from bench.microbenchmark import accuracy
from bench.microbenchmark.contenders import Contender, Floor, Step, contenders, forget, input_sets
from bench.microbenchmark.problems import FULL, Problem
from bench.microbenchmark.results import Row
from siglip_kernels.testing import Inputs, make_inputs

Errors = dict[str, Any]  # by column of Row: float, or None where not formed


def measure(
    problem: Problem,
    device: torch.device,
    seconds: float,
    names: list[str] | None,
    progress: Progress,
    without: Sequence[str] = (),
) -> list[Row]:
    """A row for each contender but those ``without``."""
    entrants = [c for c in contenders(problem, device, names) if c.name not in without]
    return measure_contenders(problem, entrants, device, seconds, progress)


def measure_contenders(
    problem: Problem, entrants: list[Contender], device: torch.device, seconds: float, progress: Progress
) -> list[Row]:
    """A row for each of ``entrants``; one that cannot run is shown with its reason, but the floor must."""
    sets = input_sets(problem, device)
    found = _Warm()
    # The floor last: its buffers would take the room in which the others' limits are found.
    for contender in sorted(entrants, key=lambda c: c.loss is None):
        forget(sets)
        release(device)
        progress.show(f"{problem}: {contender.name}, warming up, memory and errors")
        try:
            found.add(contender, problem, sets, device)
        except Exception as error:  # out of memory, no compiler, not installed
            if contender.loss is None:
                raise
            found.notes[contender.name] = f"n/a: {_reason(error)}"

    full = _full_steps(problem, device, [c for c in entrants if c.name in found.steps])
    times = _times(found, full, device, seconds, lambda done: progress.show(f"{problem}: round {done + 1}"))
    ours = next((c.name for c in entrants if c.ours and c.name in times), None)
    rows = [
        _row(problem, c, times, found.peaks.get(c.name), found.errors.get(c.name, {}), ours)
        if c.name in times
        else Row.blank(problem, c.name, found.notes[c.name])
        for c in entrants
    ]
    progress.finish(str(problem))
    return rows


def failures(rows: Sequence[Row]) -> list[str]:
    """Those of ours that could not run, in words."""
    return [
        f"{row.mode}, {row.dtype}, B = {row.B:,}, D = {row.D}: {row.contender}: {row.note}"
        for row in rows
        if row.contender.startswith("ours") and row.ms is None
    ]


@dataclass
class _Warm:
    """What is known of each contender, by its name, before any is timed."""

    steps: dict[str, Step | Floor] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # why it cannot run

    def add(self, contender: Contender, problem: Problem, sets: list[Inputs], device: torch.device) -> None:
        name, step = contender.name, contender.step(problem, sets)
        step()
        if isinstance(step, Step):
            self.peaks[name] = None if contender.graph else _peak_mib(step, device)
            self.errors[name] = accuracy.errors(gold(problem, device), step.loss, step.leaves)
        self.steps[name] = step


def _times(
    found: _Warm,
    full: dict[str, Step],
    device: torch.device,
    seconds: float,
    progress: Callable[[int], None],
) -> dict[str, list[float]]:
    """Seconds by round of each step. One that fails beside the others is left out, and the others begin again."""
    running = ""

    def before(name: str) -> None:
        nonlocal running
        running, step = name, steps[name]
        floor = steps.get("floor")
        if isinstance(floor, Floor) and step is not floor:
            floor.release()
        step.forget()

    while True:
        steps: dict[str, Step | Floor] = {**found.steps, **full}
        try:
            return interleaved(steps, device, seconds, before=before, progress=progress)
        except Exception as error:
            if running not in found.steps or running == "floor":
                raise
            found.notes[running] = f"n/a: {_reason(error)}"
            del found.steps[running]
            release(device)


def _full_steps(problem: Problem, device: torch.device, entrants: list[Contender]) -> dict[str, Step]:
    """Ours with every gradient, warmed up, to run beside a mode that forms fewer."""
    if problem.mode == FULL:
        return {}
    whole = replace(problem, mode=FULL)
    sets = input_sets(whole, device)
    steps = {_full(c): Step(c.loss, whole, sets) for c in entrants if c.ours and c.loss is not None}
    for step in steps.values():
        step()
        step.forget()
    return steps


def _full(contender: Contender) -> str:
    return f"{contender.name}, {FULL}"


def measure_alone(
    problem: Problem,
    device: torch.device,
    names: list[str] | None,
    progress: Progress,
    without: Sequence[str] = (),
    *,
    with_errors: bool = False,
) -> list[Row]:
    """Peak and time of ours but those ``without``, one run each, where the logits would not fit."""
    rows = []
    for contender in contenders(problem, device, names):
        if not contender.ours or contender.name in without:
            continue
        progress.show(f"{problem}: {contender.name}")
        try:
            rows.append(_alone(problem, contender, device, with_errors))
        except Exception as error:
            rows.append(Row.blank(problem, contender.name, f"n/a: {_reason(error)}"))
        release(device)
    progress.finish(str(problem))
    return rows


def _alone(problem: Problem, contender: Contender, device: torch.device, with_errors: bool) -> Row:
    step = contender.step(problem, input_sets(problem, device)[:1])
    assert isinstance(step, Step)
    peak = _peak_mib(step, device)
    errors: Errors = accuracy.errors(gold(problem, device), step.loss, step.leaves) if with_errors else {}
    step.forget()
    ms = 1000 * seconds_of(step, device)
    note = f"the logits alone: {problem.B**2 * 4 / MIB:,.0f} MiB"
    row = Row(*problem.key, contender.name, ms, ms, ms, 1, _tflops(problem, ms), peak_mib=peak, note=note)
    return replace(row, **errors)


def _peak_mib(step: Step, device: torch.device) -> float | None:
    """Peak of one run above the inputs and the gradients that it leaves."""
    step.forget()
    taken = peak_bytes(step, device)
    return None if taken is None else (taken - step.grad_bytes) / MIB


def gold(problem: Problem, device: torch.device) -> accuracy.Gold:
    """Of the inputs of ``problem``."""
    return _gold_of(problem.B, problem.D, problem.dtype, device)


@lru_cache(maxsize=64)
def _gold_of(B: int, D: int, dtype: torch.dtype, device: torch.device) -> accuracy.Gold:
    """The modes of one shape share it: their inputs are the same."""
    return accuracy.gold(make_inputs(B, B, D, dtype, device=device, drawn_on=device))


def _row(
    problem: Problem,
    contender: Contender,
    times: dict[str, list[float]],
    peak: float | None,
    errors: Errors,
    ours: str | None,
) -> Row:
    mine = times[contender.name]
    ms = spread([1000 * t for t in mine])
    return Row(
        *problem.key,
        contender.name,
        *ms,
        rounds=len(mine),
        tflops=_tflops(problem, ms.median),
        floor_ratio=_ratio(times["floor"], mine),
        times_ours=_ratio(mine, times[ours]) if ours else None,
        of_full=_ratio(mine, times[_full(contender)]) if _full(contender) in times else None,
        peak_mib=peak,
        **errors,
    )


def _reason(error: Exception) -> str:
    """One line: a compiler's first complaint, if any, else the error's own first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = next((line for line in lines if "error:" in line.lower()), lines[0])
    return f"{type(error).__name__}: {said}"[:100]


def _tflops(problem: Problem, ms: float) -> float:
    return problem.flops / ms / 1e9


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """Round by round, so that a slow moment of the machine weighs on both."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))
