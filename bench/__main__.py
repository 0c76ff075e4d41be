"""``python -m bench``: gradient check, then ours beside the floor and the rivals; table, CSV, Markdown, plot."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, problems, report
from bench.contenders import Contender, Step, contenders
from bench.problems import MEMORY_PROBLEM, Problem
from bench.report import Row
from bench.timing import MIB, interleaved, peak_bytes, spread
from siglip_kernels.__main__ import check


class Progress:
    """A bar on a terminal's last line; elsewhere a line now and then."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def show(self, what: str) -> None:
        seconds = time.perf_counter() - self.start
        filled = 24 * self.done // max(1, self.total)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {seconds:4.0f} s  {what}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line[:118]}", end="", file=sys.stderr, flush=True)

    def finish(self, what: str) -> None:
        self.done += 1
        if sys.stderr.isatty():
            self.show(what)
        else:
            print(
                f"{self.done}/{self.total} {what}, {time.perf_counter() - self.start:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def measure(
    problem: Problem, device: torch.device, seconds: float, names: list[str] | None, progress: Progress
) -> list[Row]:
    """A row for each contender: warmed up, timed interleaved with the others, then memory, then errors."""
    steps: dict[str, Step] = {}
    notes: dict[str, str] = {}
    entrants = contenders(problem, device, names)
    for contender in entrants:
        progress.show(f"{problem}: warming up {contender.name}")
        try:
            step = Step(contender, problem, device)
            for _ in range(2):
                step()
            steps[contender.name] = step
        except Exception as error:  # a rival that cannot run, out of memory or without a compiler, is shown as such
            if contender.ours:
                raise
            notes[contender.name] = f"n/a: {type(error).__name__}"
    times = interleaved(
        dict(steps), device, seconds, progress=lambda done: progress.show(f"{problem}: round {done + 1}")
    )
    progress.show(f"{problem}: memory and errors")
    gold = accuracy.gold(next(iter(steps.values())).leaves)
    ours = next((c.name for c in entrants if c.ours), None)
    rows = [
        _row(problem, contender, steps[contender.name], times, gold, ours, device)
        if contender.name in steps
        else _blank(problem, contender.name, notes[contender.name])
        for contender in entrants
    ]
    progress.finish(str(problem))
    return rows


def _row(
    problem: Problem,
    contender: Contender,
    step: Step,
    times: dict[str, list[float]],
    gold: accuracy.Gold,
    ours: str | None,
    device: torch.device,
) -> Row:
    mine = times[contender.name]
    ms = spread([1000 * t for t in mine])
    peak: float | None = None
    found: dict[str, Any] = {}
    if contender.loss is not None:
        step.forget()
        taken = peak_bytes(step, device)
        peak = None if taken is None else (taken - step.grad_bytes) / MIB
        found = {k.replace(" ", "_"): v for k, v in accuracy.errors(gold, step.loss, step.leaves).items()}
    step.forget()
    return Row(
        problem.mode,
        str(problem.dtype).removeprefix("torch."),
        problem.B,
        problem.D,
        contender.name,
        *ms,
        tflops=problem.flops / ms.median / 1e9,
        floor_ratio=_ratio(times["floor"], mine),
        times_ours=_ratio(mine, times[ours]) if ours else None,
        peak_mib=peak,
        **found,
    )


def _ratio(numerator: list[float], denominator: list[float]) -> float:
    """Round by round, so that a slow moment of the machine weighs on both."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def _blank(problem: Problem, name: str, note: str) -> Row:
    dtype = str(problem.dtype).removeprefix("torch.")
    return Row(problem.mode, dtype, problem.B, problem.D, name, note=note)


def measure_memory(problem: Problem, device: torch.device, progress: Progress) -> list[Row]:
    """Time and peak of ours, once, where the logits would not fit."""
    rows = []
    for contender in (c for c in contenders(problem, device) if c.ours):
        progress.show(f"{problem}: {contender.name}")
        step = Step(contender, problem, device)
        begin = time.perf_counter()
        taken = peak_bytes(step, device)
        ms = 1000 * (time.perf_counter() - begin)
        peak = None if taken is None else (taken - step.grad_bytes) / MIB
        note = f"the logits alone: {problem.B**2 * 4 / MIB:,.0f} MiB"
        dtype = str(problem.dtype).removeprefix("torch.")
        rows.append(
            Row(problem.mode, dtype, problem.B, problem.D, contender.name, ms, ms, ms, peak_mib=peak, note=note)
        )
    progress.finish(str(problem))
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="instead of the suite's")
    parser.add_argument("--dim", type=int, default=768, metavar="D", help="with --batches")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="with --batches")
    parser.add_argument("--modes", nargs="+", choices=tuple(problems.PRODUCTS), default=[problems.FULL])
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="e.g. ours eager torch.compile (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each problem")
    parser.add_argument("--quick", action="store_true", help="tiny problems, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)

    if check(None, device, quick=True):
        print("the gradient check failed: nothing is timed")
        return 1

    chosen = problems.suite(device, options.quick)
    if options.batches:
        dtype = getattr(torch, options.dtype)
        chosen = [Problem(B, options.dim, dtype, mode) for mode in options.modes for B in options.batches]
    with_memory = not options.quick and not options.batches
    progress = Progress(len(chosen) + with_memory)
    about, rows = report.environment(device), []
    for problem in chosen:
        rows += measure(problem, device, options.seconds, options.contenders, progress)
        torch._dynamo.reset()
        report.write(rows, about, options.out)  # an interruption loses nothing
    if with_memory:
        rows += measure_memory(MEMORY_PROBLEM, device, progress)
    paths = report.write(rows, about, options.out)
    print("\n" + report.markdown(rows, about))
    print("written: " + ", ".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
