"""``python -m bench gpu``: everything that is to be known of a GPU, in one command of a few minutes.

Kernels compiled ahead, gradient checks, the device's ceilings, ours beside the floor and the rivals, a batch of a
million; what matters most first, and written after every step, so that an interruption loses nothing. A backend that
fails a check in a dtype is not timed in it; everything else is.
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
from bench.gpu.session import Session, add_arguments, begin
from bench.harness.progress import Progress
from bench.harness.timing import release
from bench.microbenchmark import report
from bench.microbenchmark.contenders import is_asked_for, ours
from bench.microbenchmark.measure import failures, measure, measure_alone
from bench.microbenchmark.plot import plot
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Row
from bench.static import compilation
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.backends.triton import architecture
from siglip_kernels.loss import Backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT_OF_MEMORY = "n/a: OutOfMemoryError"
RESERVE = 120.0  # seconds kept for what comes after the comparison
COMPILE_SECONDS = 120.0


def compile_kernels(session: Session, plan: Plan, dtypes: Sequence[torch.dtype]) -> None:
    """Step 1: Triton's kernels for all the steps to come, side by side; those of the first dtype first."""
    if not _is_run("triton", dtypes[0], session):
        print("no Triton kernel is asked for")
        return
    variants = precompile.by_plan(architecture(session.device), plan, dtypes)
    begin = time.perf_counter()
    session.failed += compilation.compile_ahead(variants, COMPILE_SECONDS)
    seconds = time.perf_counter() - begin
    print(f"{len(variants)} kernels in {seconds:.0f} s by {compilation.PROCESSES} processes")
    compilation.note_late(session.late)


def check(session: Session, plan: Plan, dtypes: Sequence[torch.dtype]) -> None:
    """Step 2, and for other dtypes 5: each backend against float64, and what a table of cases does not see."""
    for dtype in dtypes:
        for backend in backends.NAMES[1:]:
            if not _is_run(backend, dtype, session):
                continue
            for title, run in _checks(backend, session.device, dtype, plan):
                try:
                    wrong = run()
                except Exception as error:
                    wrong = [f"{type(error).__name__}: {error}"]
                name = str(dtype)[6:]
                session.results.checks.append({"check": title, "backend": backend, "dtype": name, "wrong": wrong})
                print(f"{backend:8} {name:9} {title}: {'; '.join(wrong) or 'ok'}", flush=True)
                if wrong:
                    session.reject(backend, dtype, [f"{backend} {dtype} {title}: {line}" for line in wrong])


def _is_run(backend: str, dtype: torch.dtype, session: Session) -> bool:
    call = Call(1000, 1000, 768, dtype, session.device)
    return is_asked_for(backend, call, session.names) and not backends.unprepared(backend, call)


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
    if not only_plain:
        yield "statistics of the logits", partial(checks.logit_stats, backend, device, dtype, pairs, plan.checked[1])
    if device.type == "cuda":
        yield "CUDA graph replays", partial(checks.graph_replay, backend, device, dtype)
        yield "no host synchronisation", partial(checks.no_synchronisation, backend, device, dtype, pairs)


def measure_ceilings(session: Session, plan: Plan) -> None:
    """Step 3: memory, the library's products at the shapes of a block, the block kernels beside them, the workspace."""
    device, results = session.device, session.results
    results.rates.append(ceilings.copy_rate(device, session.seconds))
    for problem in plan.blocks:
        chosen = _timed(session, problem)
        results.rates += ceilings.block_rates(
            {name: backends.BACKENDS[name] for name in chosen}, problem, device, session.seconds
        )
    print(report.records(results.rates))
    if "triton" in _timed(session, plan.blocks[0]):
        results.bounds += ceilings.workspace_curve(plan.blocks[0], device, session.seconds, plan.workspaces)
        print(report.records(results.bounds))


def _timed(session: Session, problem: Problem) -> list[str]:
    """The backends that no check has failed in the dtype of ``problem``."""
    names = ours(problem, session.device, session.names)
    return [name for name in names if (name, problem.dtype) not in session.rejected]


def compare(session: Session, plan: Plan) -> None:
    """Step 4: a rival that once ran out of memory does not try a larger batch; a late problem is left out, in words."""
    device, results = session.device, session.results
    progress = Progress(len(plan.compared))
    full: dict[tuple[str, str, int], int] = {}  # (contender, mode, D): the batch that was too large
    for problem in plan.compared:
        if time.perf_counter() > session.ends - RESERVE:
            results.left_out.append(f"{problem}: no time left")
            continue
        too_large = {name: B for (name, *rest), B in full.items() if rest == [problem.mode, problem.D]}
        skipped = [name for name, B in too_large.items() if B < problem.B]
        without = [*skipped, *session.left_out(problem)]
        try:
            rows = measure(problem, device, session.seconds, session.names, progress, without)
        except Exception as error:  # the floor: the other problems may still run
            session.failed.append(f"{problem}: {type(error).__name__}: {error}")
            continue
        finally:
            torch._dynamo.reset()
            release(device)
        session.failed += failures(rows)
        full |= {(r.contender, r.mode, r.D): r.B for r in rows if r.note.startswith(OUT_OF_MEMORY)}
        rows += [Row.blank(problem, name, f"n/a: out of memory at B = {too_large[name]:,}") for name in skipped]
        results.rows += rows
        report.write(results, session.folder)
        print(report.table(rows), flush=True)


def measure_largest(session: Session, plan: Plan) -> None:
    """Step 6: time, peak memory, and the gradients of sampled rows."""
    problem = plan.largest
    without = session.left_out(problem)
    rows = measure_alone(problem, session.device, session.names, Progress(1), without, with_errors=True)
    limit = testing.LIMITS[problem.dtype].features
    session.failed += failures(rows)
    session.failed += [
        f"{problem}: {row.contender}: gradient error {error} > {limit}"
        for row in rows
        if row.ms is not None
        for error in (row.dx_error, row.dy_error)
        if error is None or not error <= limit
    ]
    session.results.rows += rows
    print(report.table(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    add_arguments(parser, minutes=8.0)
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help='e.g. ours eager; what is not proven yet, in full: "ours (cuda)"',
    )
    options = parser.parse_args(arguments)
    session = begin(parser, options, options.contenders)
    plan = plans.plan(session.device)
    first = plan.compared[0].dtype
    others = [dtype for dtype in DTYPES if dtype is not first]
    session.step("kernels compiled ahead", partial(compile_kernels, session, plan, [first, *others]))
    session.step(f"checks in {str(first)[6:]}", partial(check, session, plan, [first]))
    session.step("ceilings", partial(measure_ceilings, session, plan))
    session.step("comparison", partial(compare, session, plan))
    session.step("checks in other dtypes", partial(check, session, plan, others))
    session.step("largest batch", partial(measure_largest, session, plan))
    plot(session.results, options.out)
    return session.finish()
