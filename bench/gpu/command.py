"""``python -m bench gpu``: everything to know about a GPU, in one command of a few minutes.

Kernels compiled ahead, gradient checks, the device's ceilings, ours compared with the floor and the baselines, a batch
of a million. What matters most comes first, and results are written after every step, so that an interruption loses
nothing. A backend that fails a check in a dtype is not timed in it; everything else is.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch

from bench.gpu import ceilings, checks, precompile
from bench.gpu import plan as plans
from bench.gpu.plan import Plan
from bench.gpu.session import Session, add_session_arguments, start
from bench.harness.progress import Progress
from bench.harness.timing import free_cached_memory
from bench.microbenchmark import report
from bench.microbenchmark.contenders import backends_to_time, is_selected
from bench.microbenchmark.measure import failure_lines, measure_problem, measure_single_run
from bench.microbenchmark.plot import plot
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Row
from bench.static import compilation
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends.base import Problem as BackendProblem
from siglip_kernels.backends.triton import architecture
from siglip_kernels.loss import Backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT_OF_MEMORY_NOTE = "n/a: OutOfMemoryError"
RESERVED_SECONDS = 120.0  # kept for the steps after the comparison
COMPILE_SECONDS = 120.0


def compile_kernels(session: Session, plan: Plan, dtypes: Sequence[torch.dtype]) -> None:
    """Step 1: the Triton kernels of all later steps, in parallel processes; those of the first dtype first."""
    if not _is_selected("triton", dtypes[0], session):
        print("no Triton kernel is asked for")
        return
    variants = precompile.variants_of_plan(architecture(session.device), plan, dtypes)
    begin = time.perf_counter()
    session.failures += compilation.compile_ahead(variants, COMPILE_SECONDS)
    seconds = time.perf_counter() - begin
    print(f"{len(variants)} kernels in {seconds:.0f} s by {compilation.PROCESSES} processes")
    compilation.record_cache_misses(session.late_compilations)


def run_checks(session: Session, plan: Plan, dtypes: Sequence[torch.dtype]) -> None:
    """Step 2, and for other dtypes step 5: gradients of each backend against float64, then the checks of checks.py."""
    for dtype in dtypes:
        for backend in backends.NAMES[1:]:
            if not _is_selected(backend, dtype, session):
                continue
            for title, run in _checks(backend, session.device, dtype, plan):
                try:
                    failures = run()
                except Exception as error:
                    failures = [f"{type(error).__name__}: {error}"]
                name = str(dtype)[6:]
                session.results.checks.append({"check": title, "backend": backend, "dtype": name, "wrong": failures})
                print(f"{backend:8} {name:9} {title}: {'; '.join(failures) or 'ok'}", flush=True)
                if failures:
                    session.reject(backend, dtype, [f"{backend} {dtype} {title}: {line}" for line in failures])


def _is_selected(backend: str, dtype: torch.dtype, session: Session) -> bool:
    call = BackendProblem(1000, 1000, 768, dtype, session.device)
    return is_selected(backend, call, session.selected) and not backends.why_not_prepared(backend, call)


def _checks(
    backend: str, device: torch.device, dtype: torch.dtype, plan: Plan
) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    loss_fn: Any = partial(sigmoid_loss, backend=cast(Backend, backend))

    def gradients() -> list[str]:
        with checks.poisoned_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = testing.check(loss_fn, device=device, dtypes=[dtype], shapes=plan.check_shapes)
        print(found)
        return found.failures

    yield "gradients against float64", gradients
    yield (
        "20 repeats give the same bits",
        partial(checks.bitwise_repeatable, backend, device, dtype, plan.check_shapes[1]),
    )
    yield "many pairs", partial(checks.index_overflow, backend, device, dtype, plan.overflow_batch)
    pairs = tuple(testing.PAIRS)
    yield (
        "statistics of the logits",
        partial(checks.logit_stats, backend, device, dtype, pairs, plan.check_shapes[1]),
    )
    if device.type == "cuda":
        yield "CUDA graph replays", partial(checks.cuda_graph_replay, backend, device, dtype)
        yield "no host synchronisation", partial(checks.no_host_sync, backend, device, dtype, pairs)


def measure_ceilings(session: Session, plan: Plan) -> None:
    """Step 3: memory bandwidth, the library's GEMMs at the shapes of a block, the block kernels, the workspace."""
    device, results = session.device, session.results
    results.rates.append(ceilings.copy_bandwidth(device, session.seconds))
    for problem in plan.block_problems:
        chosen = _passed(session, problem)
        results.rates += ceilings.block_throughput(
            {name: backends.BACKENDS[name] for name in chosen}, problem, device, session.seconds
        )
    print(report.record_table(results.rates))
    if "triton" in _passed(session, plan.block_problems[0]):
        results.bounds += ceilings.workspace_sweep(plan.block_problems[0], device, session.seconds, plan.workspace_mib)
        print(report.record_table(results.bounds))


def _passed(session: Session, problem: Problem) -> list[str]:
    """The backends that passed every check in the dtype of ``problem``."""
    names = backends_to_time(problem, session.device, session.selected)
    return [name for name in names if (name, problem.dtype) not in session.rejected]


def compare(session: Session, plan: Plan) -> None:
    """Step 4: after running out of memory a contender skips larger batches; a problem without time left is listed."""
    device, results = session.device, session.results
    progress = Progress(len(plan.compared_problems))
    out_of_memory_at: dict[tuple[str, str, int], int] = {}  # (contender, mode, D): the batch that was too large
    for problem in plan.compared_problems:
        if time.perf_counter() > session.deadline - RESERVED_SECONDS:
            results.left_out.append(f"{problem}: no time left")
            continue
        too_large = {name: B for (name, *rest), B in out_of_memory_at.items() if rest == [problem.mode, problem.D]}
        skipped = [name for name, B in too_large.items() if B < problem.B]
        excluded = [*skipped, *session.excluded(problem)]
        try:
            rows = measure_problem(problem, device, session.seconds, session.selected, progress, excluded)
        except Exception as error:  # of the floor; the other problems may still run
            session.failures.append(f"{problem}: {type(error).__name__}: {error}")
            continue
        finally:
            torch._dynamo.reset()
            free_cached_memory(device)
        session.failures += failure_lines(rows)
        out_of_memory_at |= {(r.contender, r.mode, r.D): r.B for r in rows if r.note.startswith(OUT_OF_MEMORY_NOTE)}
        rows += [Row.not_measured(problem, name, f"n/a: out of memory at B = {too_large[name]:,}") for name in skipped]
        results.rows += rows
        report.write(results, session.folder)
        print(report.row_table(rows), flush=True)


def measure_largest(session: Session, plan: Plan) -> None:
    """Step 6: time, peak memory, and gradients on a sample of rows."""
    problem = plan.largest_problem
    excluded = session.excluded(problem)
    rows = measure_single_run(problem, session.device, session.selected, Progress(1), excluded, with_errors=True)
    limit = testing.LIMITS[problem.dtype].features
    session.failures += failure_lines(rows)
    session.failures += [
        f"{problem}: {row.contender}: gradient error {error} > {limit}"
        for row in rows
        if row.ms is not None
        for error in (row.dx_error, row.dy_error)
        if error is None or not error <= limit
    ]
    session.results.rows += rows
    print(report.row_table(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    add_session_arguments(parser, minutes=8.0)
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help='e.g. ours eager; one that "auto" would not choose, in full: "ours (eager)"',
    )
    options = parser.parse_args(arguments)
    session = start(parser, options, options.contenders)
    plan = plans.make_plan(session.device)
    first = plan.compared_problems[0].dtype
    others = [dtype for dtype in DTYPES if dtype is not first]
    session.run_step("kernels compiled ahead", partial(compile_kernels, session, plan, [first, *others]))
    session.run_step(f"checks in {str(first)[6:]}", partial(run_checks, session, plan, [first]))
    session.run_step("ceilings", partial(measure_ceilings, session, plan))
    session.run_step("comparison", partial(compare, session, plan))
    session.run_step("checks in other dtypes", partial(run_checks, session, plan, others))
    session.run_step("largest batch", partial(measure_largest, session, plan))
    plot(session.results, options.out)
    return session.finish()
