"""Measures one problem: each contender is warmed up, its memory and errors are read, then all are timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from bench.harness.progress import Progress
from bench.harness.timing import MIB, free_cached_memory, peak_bytes, spread, time_interleaved, time_once
from bench.microbenchmark import accuracy
from bench.microbenchmark.contenders import Contender, GemmFloor, Step, clear_grads, contenders_for, make_input_sets
from bench.microbenchmark.problems import FULL, Problem
from bench.microbenchmark.results import Row
from siglip_kernels.testing import Inputs, make_inputs

Errors = dict[str, Any]  # by column of Row: a float, or None where not computed


def measure_problem(
    problem: Problem,
    device: torch.device,
    seconds: float,
    selected: list[str] | None,
    progress: Progress,
    excluded: Sequence[str] = (),
) -> list[Row]:
    """A row for each contender except those ``excluded``."""
    contenders = [c for c in contenders_for(problem, device, selected) if c.name not in excluded]
    return measure_contenders(problem, contenders, device, seconds, progress)


def measure_contenders(
    problem: Problem, contenders: list[Contender], device: torch.device, seconds: float, progress: Progress
) -> list[Row]:
    """A row for each of ``contenders``; one that cannot run has a note with the reason. The floor must run."""
    input_sets = make_input_sets(problem, device)
    warmup = _Warmup()
    # The floor last: its buffers would reduce the memory that the others are measured with.
    for contender in sorted(contenders, key=lambda c: c.loss is None):
        clear_grads(input_sets)
        free_cached_memory(device)
        progress.show(f"{problem}: {contender.name}, warming up, memory and errors")
        try:
            warmup.run(contender, problem, input_sets, device)
        except Exception as error:  # out of memory, no compiler, not installed
            if contender.loss is None:
                raise
            warmup.notes[contender.name] = f"n/a: {_error_summary(error)}"

    all_gradient_steps = _all_gradient_steps(problem, device, [c for c in contenders if c.name in warmup.steps])
    times = _time_rounds(
        warmup, all_gradient_steps, device, seconds, lambda done: progress.show(f"{problem}: round {done + 1}")
    )
    ours = next((c.name for c in contenders if c.ours and c.name in times), None)
    rows = [
        _row(problem, c, times, warmup.peaks.get(c.name), warmup.errors.get(c.name, {}), ours)
        if c.name in times
        else Row.not_measured(problem, c.name, warmup.notes[c.name])
        for c in contenders
    ]
    progress.advance(str(problem))
    return rows


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """One line for each of ours that could not run."""
    return [
        f"{row.mode}, {row.dtype}, B = {row.B:,}, D = {row.D}: {row.contender}: {row.note}"
        for row in rows
        if row.contender.startswith("ours") and row.ms is None
    ]


@dataclass
class _Warmup:
    """What the warm-up found of each contender, by name."""

    steps: dict[str, Step | GemmFloor] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # why it cannot run

    def run(self, contender: Contender, problem: Problem, input_sets: list[Inputs], device: torch.device) -> None:
        name, step = contender.name, contender.make_step(problem, input_sets)
        step()
        if isinstance(step, Step):
            self.peaks[name] = None if contender.cuda_graph else _peak_mib(step, device)
            self.errors[name] = accuracy.sampled_errors(gold_of(problem, device), step.loss, step.leaves)
        self.steps[name] = step


def _time_rounds(
    warmup: _Warmup,
    all_gradient_steps: dict[str, Step],
    device: torch.device,
    seconds: float,
    on_round: Callable[[int], None],
) -> dict[str, list[float]]:
    """Seconds of each step by round. A step that fails here is dropped, and the others start again."""
    running = ""

    def prepare(name: str) -> None:
        nonlocal running
        running, step = name, steps[name]
        floor = steps.get("floor")
        if isinstance(floor, GemmFloor) and step is not floor:
            floor.free_buffers()
        step.reset()

    while True:
        steps: dict[str, Step | GemmFloor] = {**warmup.steps, **all_gradient_steps}
        try:
            return time_interleaved(steps, device, seconds, setup=prepare, on_round=on_round)
        except Exception as error:
            if running not in warmup.steps or running == "floor":
                raise
            warmup.notes[running] = f"n/a: {_error_summary(error)}"
            del warmup.steps[running]
            free_cached_memory(device)


def _all_gradient_steps(problem: Problem, device: torch.device, contenders: list[Contender]) -> dict[str, Step]:
    """Ours with every gradient, warmed up, to time beside a mode that forms fewer."""
    if problem.mode == FULL:
        return {}
    all_gradients = replace(problem, mode=FULL)
    input_sets = make_input_sets(all_gradients, device)
    steps = {
        _all_gradients_name(c): Step(c.loss, all_gradients, input_sets)
        for c in contenders
        if c.ours and c.loss is not None
    }
    for step in steps.values():
        step()
        step.reset()
    return steps


def _all_gradients_name(contender: Contender) -> str:
    return f"{contender.name}, {FULL}"


def measure_single_run(
    problem: Problem,
    device: torch.device,
    selected: list[str] | None,
    progress: Progress,
    excluded: Sequence[str] = (),
    *,
    with_errors: bool = False,
) -> list[Row]:
    """Peak memory and time of ours except those ``excluded``, one run each, where the logits would not fit."""
    rows = []
    for contender in contenders_for(problem, device, selected):
        if not contender.ours or contender.name in excluded:
            continue
        progress.show(f"{problem}: {contender.name}")
        try:
            rows.append(_measure_once(problem, contender, device, with_errors))
        except Exception as error:
            rows.append(Row.not_measured(problem, contender.name, f"n/a: {_error_summary(error)}"))
        free_cached_memory(device)
    progress.advance(str(problem))
    return rows


def _measure_once(problem: Problem, contender: Contender, device: torch.device, with_errors: bool) -> Row:
    step = contender.make_step(problem, make_input_sets(problem, device)[:1])
    assert isinstance(step, Step)
    peak = _peak_mib(step, device)
    errors: Errors = accuracy.sampled_errors(gold_of(problem, device), step.loss, step.leaves) if with_errors else {}
    step.reset()
    ms = 1000 * time_once(step, device)
    note = f"the logits alone: {problem.B**2 * 4 / MIB:,.0f} MiB"
    row = Row(*problem.key, contender.name, ms, ms, ms, 1, _tflops(problem, ms), peak_mib=peak, note=note)
    return replace(row, **errors)


def _peak_mib(step: Step, device: torch.device) -> float | None:
    """Peak of one run in MiB, without the inputs and the gradients that it leaves."""
    step.reset()
    peak = peak_bytes(step, device)
    return None if peak is None else (peak - step.grad_bytes) / MIB


def gold_of(problem: Problem, device: torch.device) -> accuracy.SampledGold:
    """The float64 values for the inputs of ``problem``."""
    return _cached_gold(problem.B, problem.D, problem.dtype, device)


@lru_cache(maxsize=64)
def _cached_gold(B: int, D: int, dtype: torch.dtype, device: torch.device) -> accuracy.SampledGold:
    """Cached by shape: all modes have the same inputs."""
    return accuracy.sampled_gold(make_inputs(B, B, D, dtype, device=device, drawn_on=device))


def _row(
    problem: Problem,
    contender: Contender,
    times: dict[str, list[float]],
    peak: float | None,
    errors: Errors,
    ours: str | None,
) -> Row:
    seconds = times[contender.name]
    ms = spread([1000 * t for t in seconds])
    all_gradients = times.get(_all_gradients_name(contender))
    return Row(
        *problem.key,
        contender.name,
        *ms,
        rounds=len(seconds),
        tflops=_tflops(problem, ms.median),
        floor_ratio=_ratio(times["floor"], seconds),
        times_ours=_ratio(seconds, times[ours]) if ours else None,
        of_full=_ratio(seconds, all_gradients) if all_gradients else None,
        peak_mib=peak,
        **errors,
    )


def _error_summary(error: Exception) -> str:
    """One line: the first compiler error if there is one, else the first line of the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = next((line for line in lines if "error:" in line.lower()), lines[0])
    return f"{type(error).__name__}: {message}"[:100]


def _tflops(problem: Problem, ms: float) -> float:
    return problem.flops / ms / 1e9


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds, so that a slow moment of the machine affects both."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))
