"""``python -m bench sweep``: which configuration of the Triton kernel to ship, in one command of a few minutes.

Candidates are compiled side by side, with their registers and spills; each is checked on the device, then timed beside
what is shipped and beside the library's products. One that spills, is wrong or does not compile is listed with its
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
from bench.gpu.candidates import SHIPPED, Candidate, Plan, as_triton
from bench.gpu.precompile import META, Ask
from bench.gpu.session import Session, add_arguments, begin
from bench.harness.progress import Progress
from bench.microbenchmark import accuracy, report
from bench.microbenchmark.contenders import Contender, Step, input_sets
from bench.microbenchmark.measure import gold, measure_contenders
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Rate, Row, Trial
from bench.static import compilation, triton_report
from siglip_kernels import backends, sigmoid_loss, testing
from siglip_kernels.backends.base import Problem as Call
from siglip_kernels.backends.triton import architecture, configs
from siglip_kernels.backends.triton.configs import Variant
from siglip_kernels.pairs import PairSpec

COMPILE_SECONDS = 120.0
RESERVE = 45.0  # seconds that a problem takes
MARGIN = 0.02  # a candidate must gain more than this
HARMLESS = (triton_report.NO_FIGURES, triton_report.LATE)  # problems that say nothing against a kernel


@dataclass
class Sweep:
    """What is swept, and the static figures of its kernels."""

    session: Session
    plan: Plan
    chosen: list[Candidate]
    arch: str
    static: dict[Variant, triton_report.Row] = field(default_factory=dict)

    def kernels(self, candidate: Candidate, problem: Problem) -> list[triton_report.Row]:
        """Those that ``candidate`` runs on ``problem``, that of the first block first."""
        asked = candidate.variants(self.arch, [_timed(candidate, problem)])
        return [self.static.get(variant, triton_report.Row(variant, None, [])) for variant in asked]


def compile_kernels(sweep: Sweep) -> None:
    """Step 1: every kernel that will be checked or timed."""
    asked: dict[Variant, None] = {}
    for candidate in sweep.chosen:
        asks = [_checked(candidate, sweep.plan), *(_timed(candidate, problem) for problem in sweep.plan.problems)]
        asked |= dict.fromkeys(candidate.variants(sweep.arch, asks))
    print(triton_report.COLUMNS)
    for row in triton_report.report(list(asked), compilation.PROCESSES, COMPILE_SECONDS):
        sweep.static[row.variant] = row
        print(triton_report.line(row), flush=True)
    if sweep.session.device.type == "cuda":
        compilation.note_late(sweep.session.late)


def measure(sweep: Sweep, use: str, problem: Problem) -> None:
    """Step 2, for each use and problem: check every candidate, then time those that are right."""
    session, device = sweep.session, sweep.session.device
    if time.perf_counter() > session.ends - RESERVE:
        session.results.left_out.append(f"{problem}, {use}: no time left")
        return
    chosen = [c for c in sweep.chosen if c.use == use]
    notes = {}
    for candidate in chosen:
        notes[candidate.name] = "; ".join(reasons(sweep, candidate, problem))
        print(f"{candidate.name}: {notes[candidate.name] or 'ok'}", flush=True)
    if notes.get(SHIPPED):
        session.failed.append(f"{problem}, {use}: what is shipped: {notes[SHIPPED]}")
    right = [c for c in chosen if not notes[c.name]]
    entrants = [Contender("floor", None)]
    entrants += [Contender(c.name, _loss(c, problem, device), ours=c.name == SHIPPED) for c in right]
    rows = measure_contenders(problem, entrants, device, sweep.plan.seconds, Progress(1))
    session.results.rows += [replace(row, mode=f"{row.mode}, {use}") for row in rows]
    rates = _block_rates(session, right, use, problem, sweep.plan.seconds)
    session.results.rates += rates
    blocks = {rate.name: rate for rate in rates}
    by_name = {row.contender: row for row in rows}
    trials = [_trial(sweep, c, problem, notes[c.name], by_name.get(c.name), blocks) for c in chosen]
    session.results.trials += trials
    print(report.records(trials))


def reasons(sweep: Sweep, candidate: Candidate, problem: Problem) -> list[str]:
    """Why ``candidate`` is not to be timed; empty where it may be."""
    static = [found for row in sweep.kernels(candidate, problem) for found in row.problems]
    against = [found for found in dict.fromkeys(static) if not found.startswith(HARMLESS)]
    if against:
        return against
    try:
        return wrong_ragged(candidate, sweep.plan, problem.dtype, sweep.session.device) or wrong_timed(
            candidate, problem, sweep.session.device
        )
    except Exception as error:
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]]


def wrong_ragged(candidate: Candidate, plan: Plan, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every gradient of a problem that no tile divides, against float64; then the same bits again."""
    M, N, _ = plan.checked
    pairs = candidates.pairs(candidate.use, M, N, device)
    inputs = testing.make_inputs(*plan.checked, dtype, "trained", device=device)

    loss = partial(sigmoid_loss, backend="triton")
    with as_triton(candidate.kernel()):
        with checks.poisoned_memory():
            wrong = checks.against_float64(loss, inputs, **pairs)
        first, *others = (testing.differentiate(loss, inputs, **pairs) for _ in range(1 + plan.repeats))
    differing = sum(not all(map(torch.equal, other, first)) for other in others)
    return wrong + [f"{differing} of {plan.repeats} repeats give other bits"] * bool(differing)


def wrong_timed(candidate: Candidate, problem: Problem, device: torch.device) -> list[str]:
    """The loss and sampled gradients of the very problem that is timed, against float64."""
    step = Step(_loss(candidate, problem, device), problem, input_sets(problem, device)[:1])
    step()
    limits = testing.LIMITS[problem.dtype]
    errors = accuracy.errors(gold(problem, device), step.loss, step.leaves)
    bounds = {"loss_error": limits.loss, "dx_error": limits.features, "dy_error": limits.features}
    return [
        f"{name} {errors[name]} at {problem}"
        for name, bound in bounds.items()
        if (value := errors[name]) is None or not value <= bound
    ]


def conclusions(trials: Sequence[Trial]) -> list[str]:
    """What to ship for each use: the candidate that gains most over all D, if it gains enough and loses nowhere."""
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
        gains = sum(ratios[best].values()) / len(widths) < 1 - MARGIN and max(ratios[best].values()) <= 1
        takes = ", ".join(f"{ratio:.3f} at D = {D}" for D, ratio in sorted(ratios[best].items()))
        lead = f"ship {best}: it takes" if gains else f"keep what is shipped; the best other, {best}, takes"
        lines.append(f"{use}: {lead} {takes} of the shipped time")
    return lines


def _loss(candidate: Candidate, problem: Problem, device: torch.device) -> Any:
    """The public loss by ``candidate``, on the pairs of its use."""
    kernel, pairs = candidate.kernel(), candidates.timed_pairs(candidate.use, problem.B, device)

    def loss(*leaves: torch.Tensor) -> Any:
        with as_triton(kernel):
            return sigmoid_loss(*leaves, **pairs, backend="triton")

    return loss


def _timed(candidate: Candidate, problem: Problem) -> Ask:
    shape = problem.B, problem.B, problem.D
    return Ask(shape, problem.dtype, candidates.timed_pairs(candidate.use, problem.B, META))


def _checked(candidate: Candidate, plan: Plan) -> Ask:
    return Ask(plan.checked, plan.problems[0].dtype, candidates.pairs(candidate.use, *plan.checked[:2], META))


def _block_rates(session: Session, right: list[Candidate], use: str, problem: Problem, seconds: float) -> list[Rate]:
    """The block kernel of each, interleaved with the library's products."""
    kernels = {f"{use}, {c.name}": c.kernel() for c in right}
    pairs = PairSpec(**candidates.timed_pairs(use, problem.B, session.device))
    try:
        return ceilings.block_rates(kernels, problem, session.device, seconds, pairs)
    except Exception as error:
        session.failed.append(f"{problem}, {use}, blocks alone: {type(error).__name__}: {error}")
        return []


def _trial(
    sweep: Sweep,
    candidate: Candidate,
    problem: Problem,
    note: str,
    row: Row | None,
    blocks: dict[str, Rate],
) -> Trial:
    rows = sweep.kernels(candidate, problem)
    figures = [r.resources for r in rows if r.resources is not None]
    R, C = problem.block(candidate.kernel(), sweep.session.device)
    trial = Trial(
        candidate.use,
        problem.D,
        candidate.name,
        triton_report.tile(rows[0].variant.config),
        f"{R:,} × {C:,}",
        registers=max((f.registers for f in figures), default=None),
        spills=max((f.spills for f in figures), default=None),
        shared_kib=max((f.shared / 1024 for f in figures), default=None),
        note=note or (row.note if row else ""),
    )
    if row is None or row.ms is None:
        return trial
    rate = blocks.get(f"block ({candidate.use}, {candidate.name})")
    alone: dict[str, Any] = {} if rate is None else {"block_ms": rate.ms, "block_tflops": rate.rate}
    return replace(
        trial, ms=row.ms, floor_ratio=row.floor_ratio, of_shipped=row.times_ours, peak_mib=row.peak_mib, **alone
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench sweep", description=__doc__)
    add_arguments(parser, minutes=8.0)
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these, beside what is shipped")
    options = parser.parse_args(arguments)
    session = begin(parser, options)
    if session.device.type == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    plan = candidates.plan(session.device)
    problem = plan.problems[0]
    reasons = backends.unprepared("triton", Call(*plan.checked, problem.dtype, session.device))
    if reasons:
        parser.error("Triton cannot run here: " + "; ".join(reasons))

    arch = architecture(session.device)
    every = candidates.candidates(configs.LARGE[configs.family(arch), problem.dtype.itemsize], plan)
    unknown = set(options.candidates or ()) - {c.name for c in every}
    if unknown:
        parser.error(f"no such candidates: {sorted(unknown)}; there are {[c.name for c in every]}")
    chosen = [c for c in every if options.candidates is None or c.name in (SHIPPED, *options.candidates)]
    sweep = Sweep(session, plan, chosen, arch)
    session.step("kernels compiled ahead", partial(compile_kernels, sweep))
    for use in dict.fromkeys(c.use for c in chosen):
        for problem in plan.problems:
            session.step(f"{use}, D = {problem.D}", partial(measure, sweep, use, problem))
    if session.device.type == "cpu":
        session.results.conclusions.append("these times are those of Triton's interpreter: only a GPU's mean anything")
    session.results.conclusions += conclusions(session.results.trials)
    report.write(session.results, options.out)
    print("\n" + report.markdown(session.results))
    return session.finish()
