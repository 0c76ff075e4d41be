"""``python -m bench sweep``: which configuration of the Triton or the CUDA kernel to ship, in one command of minutes.

Candidates are compiled in parallel, with their registers and spills; each is checked on the device, then timed in turns
with the shipped configuration and the library's GEMMs. One that spills, is wrong or does not compile is listed with the
reason, and the others are timed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from bench.gpu import candidates, ceilings, checks
from bench.gpu.candidates import SHIPPED, Candidate, SweepPlan, registered_as_triton
from bench.gpu.precompile import META, LossCall
from bench.gpu.session import Session, add_session_arguments, start
from bench.harness.progress import Progress
from bench.microbenchmark import accuracy, report
from bench.microbenchmark.contenders import Contender, Step, make_input_sets
from bench.microbenchmark.measure import gold_of, measure_contenders
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Rate, Row, Trial
from bench.static import compilation, triton_report
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends.base import Problem as BackendProblem
from siglip_kernels.backends.triton import architecture, configs
from siglip_kernels.backends.triton.configs import Variant
from siglip_kernels.pairs import PairSpec

COMPILE_SECONDS = 120.0
RESERVED_SECONDS = 45.0  # that one problem takes
MIN_GAIN = 0.02  # of the shipped time; a smaller gain changes nothing
INCONCLUSIVE = (triton_report.NO_FIGURES, triton_report.TIMED_OUT)  # problems of the report rather than of the kernel


@dataclass
class Sweep:
    """The candidates of the sweep, and the static report of their kernels."""

    session: Session
    plan: SweepPlan
    candidates: list[Candidate]
    arch: str
    static_rows: dict[Variant, triton_report.Row] = field(default_factory=dict)

    def rows_of(self, candidate: Candidate, problem: Problem) -> list[triton_report.Row]:
        """The static rows of the kernels that ``candidate`` launches on ``problem``, the first block's first."""
        variants = candidate.launched_variants(self.arch, [_timed_call(candidate, problem)])
        return [self.static_rows.get(variant, triton_report.Row(variant, None, [])) for variant in variants]


def compile_kernels(sweep: Sweep) -> None:
    """Step 1: compile every kernel that will be checked or timed."""
    variants: dict[Variant, None] = {}
    for candidate in sweep.candidates:
        calls = [
            _checked_call(candidate, sweep.plan),
            *(_timed_call(candidate, problem) for problem in sweep.plan.problems),
        ]
        variants |= dict.fromkeys(candidate.launched_variants(sweep.arch, calls))
    print(triton_report.HEADER)
    for row in triton_report.inspect_variants(list(variants), compilation.PROCESSES, COMPILE_SECONDS):
        sweep.static_rows[row.variant] = row
        print(triton_report.format_row(row), flush=True)
    if sweep.session.device.type == "cuda":
        compilation.record_cache_misses(sweep.session.late_compilations)


def measure_candidates(sweep: Sweep, pairs_kind: str, problem: Problem) -> None:
    """Step 2, for each kind of pairs and problem: check every candidate, then time those that passed."""
    session, device = sweep.session, sweep.session.device
    if time.perf_counter() > session.deadline - RESERVED_SECONDS:
        session.results.left_out.append(f"{problem}, {pairs_kind}: no time left")
        return
    chosen = [c for c in sweep.candidates if c.pairs_kind == pairs_kind]
    notes = {}
    for candidate in chosen:
        notes[candidate.name] = "; ".join(rejection_reasons(sweep, candidate, problem))
        print(f"{candidate.name}: {notes[candidate.name] or 'ok'}", flush=True)
    if notes.get(SHIPPED):
        session.failures.append(f"{problem}, {pairs_kind}: what is shipped: {notes[SHIPPED]}")
    passed = [c for c in chosen if not notes[c.name]]
    contenders = [Contender("floor", None)]
    contenders += [Contender(c.name, candidate_loss(c, problem, device), ours=c.name == SHIPPED) for c in passed]
    rows = measure_contenders(problem, contenders, device, sweep.plan.seconds, Progress(1))
    session.results.rows += [replace(row, mode=f"{row.mode}, {pairs_kind}") for row in rows]
    rates = _block_rates(session, passed, pairs_kind, problem, sweep.plan.seconds)
    session.results.rates += rates
    blocks = {rate.name: rate for rate in rates}
    by_name = {row.contender: row for row in rows}
    trials = [_trial(sweep, c, problem, notes[c.name], by_name.get(c.name), blocks) for c in chosen]
    session.results.trials += trials
    print(report.record_table(trials))


def rejection_reasons(sweep: Sweep, candidate: Candidate, problem: Problem) -> list[str]:
    """Why ``candidate`` is excluded from timing; empty if it passed."""
    static = [found for row in sweep.rows_of(candidate, problem) for found in row.problems]
    defects = [found for found in dict.fromkeys(static) if not found.startswith(INCONCLUSIVE)]
    if defects:
        return defects
    try:
        return check_ragged_shape(candidate, sweep.plan, problem.dtype, sweep.session.device) or check_timed_problem(
            candidate, problem, sweep.session.device
        )
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]]


def check_ragged_shape(candidate: Candidate, plan: SweepPlan, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every gradient of a problem that no tile divides, against float64; then repeats, bit by bit."""
    M, N, _ = plan.check_shape
    pairs = candidates.check_pairs(candidate.pairs_kind, M, N, device)
    inputs = testing.make_inputs(*plan.check_shape, dtype, "trained", device=device)

    loss = partial(sigmoid_loss, backend="triton")
    with registered_as_triton(candidate.make_kernel()):
        with checks.poisoned_memory():
            wrong = checks.against_float64(loss, inputs, **pairs)
        first, *others = (testing.differentiate(loss, inputs, **pairs) for _ in range(1 + plan.repeats))
    differing = sum(not all(map(torch.equal, other, first)) for other in others)
    return wrong + [f"{differing} of {plan.repeats} repeats give other bits"] * bool(differing)


def check_timed_problem(candidate: Candidate, problem: Problem, device: torch.device) -> list[str]:
    """The loss and sampled gradients of the problem that will be timed, against float64."""
    step = Step(candidate_loss(candidate, problem, device), problem, make_input_sets(problem, device)[:1])
    step()
    limits = testing.LIMITS[problem.dtype]
    errors = accuracy.sampled_errors(gold_of(problem, device), step.loss, step.leaves)
    bounds = {"loss_error": limits.loss, "dx_error": limits.features, "dy_error": limits.features}
    return [
        f"{name} {errors[name]} at {problem}"
        for name, bound in bounds.items()
        if (value := errors[name]) is None or not value <= bound
    ]


def conclusions(trials: Sequence[Trial]) -> list[str]:
    """What to ship for each kind of pairs: the candidate that gains most over all D, if enough and at every D."""
    lines = []
    for use in dict.fromkeys(trial.use for trial in trials):
        ratios: dict[str, dict[int, float]] = {}
        for trial in trials:
            if trial.use == use and trial.candidate != SHIPPED and trial.of_shipped is not None:
                ratios.setdefault(trial.candidate, {})[trial.D] = trial.of_shipped
        widths = {D for by_width in ratios.values() for D in by_width}
        ratios = {name: by_width for name, by_width in ratios.items() if set(by_width) == widths}
        if not ratios:
            lines.append(f"{use}: keep what is shipped; nothing was timed beside it")
            continue
        best = min(ratios, key=lambda name: sum(ratios[name].values()))
        gains = sum(ratios[best].values()) / len(widths) < 1 - MIN_GAIN and max(ratios[best].values()) <= 1
        takes = ", ".join(f"{ratio:.3f} at D = {D}" for D, ratio in sorted(ratios[best].items()))
        lead = f"ship {best}: it takes" if gains else f"keep what is shipped; the best other, {best}, takes"
        lines.append(f"{use}: {lead} {takes} of the shipped time")
    return lines


def candidate_loss(candidate: Candidate, problem: Problem, device: torch.device) -> Any:
    """The public loss with ``candidate`` as the Triton backend, on the pairs of its kind."""
    kernel, pairs = candidate.make_kernel(), candidates.timed_pairs(candidate.pairs_kind, problem.B, device)

    def loss(*leaves: torch.Tensor) -> Any:
        with registered_as_triton(kernel):
            return sigmoid_loss(*leaves, **pairs, backend="triton")

    return loss


def _timed_call(candidate: Candidate, problem: Problem) -> LossCall:
    shape = problem.B, problem.B, problem.D
    return LossCall(shape, problem.dtype, candidates.timed_pairs(candidate.pairs_kind, problem.B, META))


def _checked_call(candidate: Candidate, plan: SweepPlan) -> LossCall:
    return LossCall(
        plan.check_shape,
        plan.problems[0].dtype,
        candidates.check_pairs(candidate.pairs_kind, *plan.check_shape[:2], META),
    )


def _block_rates(
    session: Session, passed: list[Candidate], pairs_kind: str, problem: Problem, seconds: float
) -> list[Rate]:
    """The block kernel of each, timed in turns with the library's GEMMs."""
    kernels = {f"{pairs_kind}, {c.name}": c.make_kernel() for c in passed}
    pairs = PairSpec(**candidates.timed_pairs(pairs_kind, problem.B, session.device))
    try:
        return ceilings.block_throughput(kernels, problem, session.device, seconds, pairs)
    except Exception as error:
        session.failures.append(f"{problem}, {pairs_kind}, blocks alone: {type(error).__name__}: {error}")
        return []


def _trial(
    sweep: Sweep,
    candidate: Candidate,
    problem: Problem,
    note: str,
    row: Row | None,
    blocks: dict[str, Rate],
) -> Trial:
    rows = sweep.rows_of(candidate, problem)
    figures = [r.resources for r in rows if r.resources is not None]
    R, C = problem.block_shape(candidate.make_kernel(), sweep.session.device)
    trial = Trial(
        candidate.pairs_kind,
        problem.D,
        candidate.name,
        "128x128" if candidate.cuda else str(rows[0].variant.config),
        f"{R:,} × {C:,}",
        registers=max((f.registers for f in figures), default=None),
        spills=max((f.spills for f in figures), default=None),
        shared_kib=max((f.shared / 1024 for f in figures), default=None),
        note=note or (row.note if row else ""),
    )
    if row is None or row.ms is None:
        return trial
    rate = blocks.get(f"block ({candidate.pairs_kind}, {candidate.name})")
    alone: dict[str, Any] = {} if rate is None else {"block_ms": rate.ms, "block_tflops": rate.rate}
    return replace(
        trial, ms=row.ms, floor_ratio=row.floor_ratio, of_shipped=row.times_ours, peak_mib=row.peak_mib, **alone
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sweep", description=__doc__)
    add_session_arguments(parser, minutes=8.0)
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these, beside what is shipped")
    options = parser.parse_args(arguments)
    session = start(parser, options)
    if session.device.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    plan = candidates.make_plan(session.device)
    problem = plan.problems[0]
    reasons = backends.why_not_prepared("triton", BackendProblem(*plan.check_shape, problem.dtype, session.device))
    if reasons:
        parser.error("Triton cannot run here: " + "; ".join(reasons))

    arch = architecture(session.device)
    every = candidates.make_candidates(configs.LARGE[configs.family(arch), problem.dtype.itemsize], plan)
    unknown = set(options.candidates or ()) - {c.name for c in every}
    if unknown:
        parser.error(f"no such candidates: {sorted(unknown)}; there are {[c.name for c in every]}")
    chosen = [c for c in every if options.candidates is None or c.name in (SHIPPED, *options.candidates)]
    sweep = Sweep(session, plan, chosen, arch)
    session.run_step("kernels compiled ahead", partial(compile_kernels, sweep))
    for pairs_kind in dict.fromkeys(c.pairs_kind for c in chosen):
        for problem in plan.problems:
            session.run_step(f"{pairs_kind}, D = {problem.D}", partial(measure_candidates, sweep, pairs_kind, problem))
    if session.device.type == "cpu":
        session.results.conclusions.append("these times are those of Triton's interpreter: only a GPU's mean anything")
    session.results.conclusions += conclusions(session.results.trials)
    report.write(session.results, options.out)
    print("\n" + report.markdown(session.results))
    return session.finish()
