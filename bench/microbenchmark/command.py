"""The microbenchmark of ``python -m bench``: gradient check, then ours beside the floor and the baselines."""

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
from bench.microbenchmark.contenders import ours
from bench.microbenchmark.measure import failures, measure, measure_alone
from bench.microbenchmark.plot import plot
from bench.microbenchmark.problems import MEMORY_PROBLEM, Problem
from bench.microbenchmark.results import Results, Row
from siglip_kernels.__main__ import QUICK_SHAPES, judge


def gradients_are_right(chosen: Sequence[Problem], device: torch.device) -> bool:
    """A quick gradient check of every backend in every dtype that it is to be timed in."""
    timed = dict.fromkeys((name, problem.dtype) for problem in chosen for name in ours(problem, device))
    right = True
    for name, dtype in timed:
        found = judge(name, device, [dtype], QUICK_SHAPES)
        print(f"{name}: {'ok' if found.ok else 'FAILED'}\n{found}\n", flush=True)
        right &= found.ok
    return right


def expected_seconds(problem: Problem, rows: Sequence[Row], runs: int = 5) -> float:
    """Of ``problem``, from the largest of its dtype among ``rows``: warmed up, its memory read, timed three times."""
    known = [row for row in rows if row.dtype == problem.key[1] and row.ms and row.rounds != 1]
    last = max(known, key=lambda row: row.B, default=None)
    if last is None:
        return 0.0
    of_last = sum(row.ms or 0 for row in known if (row.mode, row.B, row.D) == (last.mode, last.B, last.D)) / 1000
    work = problem.flops / Problem(last.B, last.D, problem.dtype, last.mode).flops
    return runs * of_last * work


def parse(arguments: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=description)
    parser.add_argument("--device", type=timed_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's own choice)")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="instead of the suite's")
    parser.add_argument("--dim", type=int, default=768, metavar="D", help="with --batches")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="with --batches")
    parser.add_argument("--modes", nargs="+", choices=tuple(problems.PRODUCTS), default=[problems.FULL])
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="e.g. ours eager torch.compile (default: all)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for each problem")
    parser.add_argument("--minutes", type=float, default=4.5, help="nothing is begun that would take longer")
    parser.add_argument("--quick", action="store_true", help="tiny problems, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, *, description: str | None = __doc__) -> int:
    """``description``: of ``--help``, which also names the other verbs."""
    options = parse(arguments, description)
    device, ends = options.device, time.perf_counter() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)

    chosen = problems.suite(device, options.quick)
    if options.batches:
        dtype = getattr(torch, options.dtype)
        chosen = [Problem(B, options.dim, dtype, mode) for mode in options.modes for B in options.batches]
    if not gradients_are_right([*chosen, MEMORY_PROBLEM], device):
        print("the gradient check failed: nothing is timed")
        return 1

    alone = [] if options.quick or options.batches else [MEMORY_PROBLEM]
    progress = Progress(len(chosen) + len(alone))
    results = Results(environment(device))
    for problem in [*chosen, *alone]:
        mine = [row for row in results.rows if row.contender.startswith("ours")]
        expected = (mine, 2) if problem in alone else (results.rows, 5)
        if time.perf_counter() + expected_seconds(problem, *expected) > ends:
            results.left_out.append(f"{problem}: no time left")
        elif problem in alone:
            results.rows += measure_alone(problem, device, options.contenders, progress)
        else:
            results.rows += measure(problem, device, options.seconds, options.contenders, progress)
        torch._dynamo.reset()
        report.write(results, options.out)  # an interruption loses nothing
    paths = report.write(results, options.out) + plot(results, options.out)
    print("\n" + report.markdown(results))
    print("written: " + ", ".join(map(str, paths)))
    failed = failures(results.rows)
    for line in failed:
        print(f"FAILED {line}")
    return int(bool(failed))
