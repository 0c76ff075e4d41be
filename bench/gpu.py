"""``python -m bench gpu``: everything that is to be known of a GPU, in one command of a few minutes.

Gradient checks, the device's ceilings, ours beside the floor and the rivals, a batch of a million; in this order, and
written after every step, so that an interruption loses nothing. Nothing is timed where a check fails.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from bench import ceilings, checks, problems, report
from bench.contenders import is_asked_for, ours
from bench.measure import measure, measure_alone
from bench.problems import Plan
from bench.progress import Progress
from bench.report import Results, Row
from bench.timing import release
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.loss import Backend

OUT_OF_MEMORY = "n/a: OutOfMemoryError"
RESERVE = 60.0  # seconds kept for the largest batch
SECONDS = {"cuda": 1.5, "cpu": 0.2}  # of timing for each problem


@dataclass
class Session:
    """One run of the command: what is asked for, what has been found."""

    device: torch.device
    plan: Plan
    folder: Path
    names: list[str] | None  # of contenders
    ends: float  # by time.perf_counter
    results: Results
    failed: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return SECONDS[self.device.type]

    def step(self, title: str, run: Callable[[], None]) -> None:
        """Run one step, keep what it found, and go on whatever happens: the device may not be there tomorrow."""
        print(f"\n## {title}", flush=True)
        begin = time.perf_counter()
        try:
            run()
        except Exception as error:
            self.failed.append(f"{title}: {type(error).__name__}: {error}")
            print(self.failed[-1], file=sys.stderr)
        release(self.device)
        self.results.seconds[title] = round(time.perf_counter() - begin, 1)
        report.write(self.results, self.folder)


def check(session: Session) -> None:
    """Step 1: every backend of the device against float64, and what a table of cases does not see."""
    device, plan = session.device, session.plan
    for backend, dtype in itertools.product(backends.NAMES[1:], (torch.bfloat16, torch.float16, torch.float32)):
        call = Call(1000, 1000, 768, dtype, device)
        if not is_asked_for(backend, call, session.names) or backends.unprepared(backend, call):
            continue
        for title, run in _checks(backend, device, dtype, plan):
            wrong = run()
            session.results.checks.append({"check": title, "backend": backend, "dtype": str(dtype)[6:], "wrong": wrong})
            print(f"{backend:8} {str(dtype)[6:]:9} {title}: {'; '.join(wrong) or 'ok'}", flush=True)
            session.failed += [f"{backend} {dtype} {title}: {line}" for line in wrong]


def _checks(
    backend: str, device: torch.device, dtype: torch.dtype, plan: Plan
) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    loss_fn: Any = partial(sigmoid_loss, backend=cast(Backend, backend))
    only_plain = backends.only_plain(backend, Call(*plan.checked[-1], dtype, device))
    pairs = testing.PLAIN_PAIRS if only_plain else tuple(testing.PAIRS)

    def gradients() -> list[str]:
        with checks.poisoned_memory(), warnings.catch_warnings(action="ignore"):
            found = testing.check(loss_fn, device=device, dtypes=[dtype], shapes=plan.checked, pairs=pairs)
        print(found)
        return found.failures

    yield "gradients against float64", gradients
    yield "20 repeats give the same bits", partial(checks.repeats, backend, device, dtype, plan.checked[1])
    yield "many pairs", partial(checks.many_pairs, backend, device, dtype, plan.many_pairs)
    if device.type == "cuda":
        yield "CUDA graph replays", partial(checks.graph_replay, backend, device, dtype)
        yield "no host synchronisation", partial(checks.no_synchronisation, backend, device, dtype, pairs)


def measure_ceilings(session: Session) -> None:
    """Step 2: memory, the library's products at the shapes of a block, the block kernel beside them, the workspace."""
    device, plan, results = session.device, session.plan, session.results
    results.rates.append(ceilings.copy_rate(device, session.seconds))
    for problem in plan.blocks:
        for name in ours(problem, device, session.names):
            results.rates += ceilings.block_rates(backends.BACKENDS[name], problem, device, session.seconds)
    print(report.records(results.rates))
    if "triton" in ours(plan.blocks[0], device):
        results.bounds += ceilings.workspace_curve(plan.blocks[0], device, session.seconds, plan.workspaces)
        print(report.records(results.bounds))


def compare(session: Session) -> None:
    """Step 3: a rival that once ran out of memory does not try a larger batch; a late problem is left out, in words."""
    device, results = session.device, session.results
    progress = Progress(len(session.plan.compared))
    full: dict[tuple[str, str, int], int] = {}  # (contender, mode, D): the batch that was too large
    for problem in session.plan.compared:
        if time.perf_counter() > session.ends - RESERVE:
            results.left_out.append(f"{problem}: no time left")
            continue
        too_large = {name: B for (name, *rest), B in full.items() if rest == [problem.mode, problem.D]}
        skipped = [name for name, B in too_large.items() if B < problem.B]
        try:
            rows = measure(problem, device, session.seconds, session.names, progress, skipped)
        except Exception as error:  # ours or the floor: the other problems may still run
            session.failed.append(f"{problem}: {type(error).__name__}: {error}")
            continue
        finally:
            torch._dynamo.reset()
            release(device)
        full |= {(r.contender, r.mode, r.D): r.B for r in rows if r.note.startswith(OUT_OF_MEMORY)}
        rows += [Row.blank(problem, name, f"n/a: out of memory at B = {too_large[name]:,}") for name in skipped]
        results.rows += rows
        report.write(results, session.folder)
        print(report.table(rows), flush=True)


def measure_largest(session: Session) -> None:
    """Step 4: time, peak memory, and the gradients of sampled rows."""
    problem = session.plan.largest
    rows = measure_alone(problem, session.device, session.names, Progress(1), with_errors=True)
    limit = testing.LIMITS[problem.dtype].features
    session.failed += [
        f"{problem}: {row.contender}: gradient error {error} > {limit}"
        for row in rows
        for error in (row.dx_error, row.dy_error)
        if error is None or not error <= limit
    ]
    session.results.rows += rows
    print(report.table(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu: tiny sizes, to see that it runs")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help='e.g. ours eager; what is not proven yet, in full: "ours (cuda)"',
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu shows that the command runs")

    device = torch.device(options.device)
    ends = time.perf_counter() + 60 * options.minutes
    results = Results(report.environment(device))
    session = Session(device, problems.plan(device), options.out, options.contenders, ends, results)
    session.step("gradient checks", partial(check, session))
    if not session.failed:
        session.step("ceilings", partial(measure_ceilings, session))
        session.step("comparison", partial(compare, session))
        session.step("largest batch", partial(measure_largest, session))
        report.plot(results, options.out)
    print("\n".join(["", *results.left_out, *(f"FAILED {line}" for line in session.failed)]))
    print(f"written: {options.out}; seconds by step: {results.seconds}")
    return int(bool(session.failed))
