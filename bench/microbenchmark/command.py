"""The microbenchmark of ``python -m bench``: gradient check, then ours compared with the floor and baselines."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness.devices import timed_device
from bench.harness.environment import environment
from bench.harness.progress import Progress
from bench.microbenchmark import problems, report
from bench.microbenchmark.contenders import backends_to_time
from bench.microbenchmark.measure import failure_lines, measure_problem, measure_single_run
from bench.microbenchmark.plot import plot
from bench.microbenchmark.problems import MEMORY_PROBLEM, Problem
from bench.microbenchmark.results import Results, Row
from siglip_kernels.__main__ import QUICK_SHAPES, judge


def check_gradients(chosen: Sequence[Problem], device: torch.device) -> bool:
    """A quick gradient check of every backend in every dtype in which it will be timed."""
    timed = dict.fromkeys((name, problem.dtype) for problem in chosen for name in backends_to_time(problem, device))
    all_ok = True
    for name, dtype in timed:
        checked = judge(name, device, [dtype], QUICK_SHAPES)
        print(f"{name}: {'ok' if checked.ok else 'FAILED'}\n{checked}\n", flush=True)
        all_ok &= checked.ok
    return all_ok


def estimate_seconds(problem: Problem, rows: Sequence[Row], runs: int = 5) -> float:
    """Seconds of ``runs`` runs of ``problem``, scaled from the largest problem of its dtype among ``rows``.

    Five runs: the warm-up, the one that reads peak memory, and three that are timed.
    """
    measured = [row for row in rows if row.dtype == problem.key[1] and row.ms and row.rounds != 1]
    largest = max(measured, key=lambda row: row.B, default=None)
    if largest is None:
        return 0.0
    seconds_of_largest = (
        sum(row.ms or 0 for row in measured if (row.mode, row.B, row.D) == (largest.mode, largest.B, largest.D)) / 1000
    )
    work_ratio = problem.flops / Problem(largest.B, largest.D, problem.dtype, largest.mode).flops
    return runs * seconds_of_largest * work_ratio


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=description)
    parser.add_argument("--device", type=timed_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="instead of the suite's")
    parser.add_argument("--dim", type=int, default=768, metavar="D", help="with --batches")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="with --batches")
    parser.add_argument("--modes", nargs="+", choices=tuple(problems.GEMMS), default=[problems.FULL])
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="e.g. ours eager torch.compile (default: all)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each problem")
    parser.add_argument("--minutes", type=float, default=4.5, help="nothing is begun that would take longer")
    parser.add_argument("--quick", action="store_true", help="tiny problems, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, *, description: str | None = __doc__) -> int:
    """``description``: of ``--help``, which also names the other verbs."""
    options = parse(arguments, description)
    device, deadline = options.device, time.perf_counter() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)

    chosen = problems.suite(device, options.quick)
    if options.batches:
        dtype = getattr(torch, options.dtype)
        chosen = [Problem(B, options.dim, dtype, mode) for mode in options.modes for B in options.batches]
    if not check_gradients([*chosen, MEMORY_PROBLEM], device):
        print("the gradient check failed: nothing is timed")
        return 1

    single_run = [] if options.quick or options.batches else [MEMORY_PROBLEM]
    progress = Progress(len(chosen) + len(single_run))
    results = Results(environment(device))
    for problem in [*chosen, *single_run]:
        ours = [row for row in results.rows if row.contender.startswith("ours")]
        expected = (ours, 2) if problem in single_run else (results.rows, 5)
        if time.perf_counter() + estimate_seconds(problem, *expected) > deadline:
            results.left_out.append(f"{problem}: no time left")
        elif problem in single_run:
            results.rows += measure_single_run(problem, device, options.contenders, progress)
        else:
            results.rows += measure_problem(problem, device, options.seconds, options.contenders, progress)
        torch._dynamo.reset()
        report.write(results, options.out)  # after every problem, so that an interruption loses nothing
    paths = report.write(results, options.out) + plot(results, options.out)
    print("\n" + report.markdown(results))
    print("written: " + ", ".join(map(str, paths)))
    failed = failure_lines(results.rows)
    for line in failed:
        print(f"FAILED {line}")
    return int(bool(failed))
