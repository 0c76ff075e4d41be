"""``python -m bench sweep`` under Triton's interpreter: what fails is named, and the others are timed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import candidates, sweep
from bench.gpu.candidates import DIAGONAL, IDS, SHIPPED, Candidate
from bench.microbenchmark import report
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Results, Trial
from bench.static import triton_report
from bench.static.triton_report import Resources, Row
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.backends.triton.configs import Config, Variant
from tests.bench.gpu.faulty import OutOfResource, needs_interpreter

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = candidates.SweepPlan((Problem(32, 8, torch.float16),), (33, 40, 8), 1, ((16, 32),), (0.0625,), (), 0.0)
SMALL = Config(32, 32, 16, num_warps=4, num_stages=2)
FIGURES = {"registers": 100, "stack": 0, "shared": 2048, "tensor_core": 4, "instructions": 1000, "conversions": 0}
SOUND = Resources(**FIGURES, spills=0, barriers=21)


class Wrong(TritonBlockKernel):
    """Loses the last row of dz."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.dz is not None:
            task.dz[-1] = 0


class Restless(TritonBlockKernel):
    """Gives other bits every other time."""

    calls = 0

    def block(self, task: BlockTask) -> None:
        super().block(task)
        Restless.calls += 1
        if Restless.calls % 2:
            task.dz[3, 3] *= 1.01


class Late(TritonBlockKernel):
    """Is right on the ragged problem, and wrong on the one that is timed."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if len(task.x) == TINY.problems[0].B and task.dz is not None:
            task.dz[:] = 0


@dataclass(frozen=True)
class Faulty(Candidate):
    kind: type[TritonBlockKernel] = TritonBlockKernel

    def make_kernel(self) -> TritonBlockKernel:
        return self.kind(self.config, dz_bytes=self.dz_bytes, blocks=self.blocks)


def static(problems: dict[int, list[str]], seen: list[Variant]) -> Any:
    """A report without a compiler; ``problems`` by the tile's columns."""

    def report(variants: list[Variant], *how: Any) -> Iterator[Row]:
        seen.extend(variants)
        for variant in variants:
            found = problems.get(variant.config.block_n, [])
            yield Row(variant, None if "no figures" in str(found) else SOUND, found)

    return report


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    needs_interpreter()

    def run(chosen: list[Candidate], problems: dict[int, list[str]], *arguments: str) -> tuple[int, Results]:
        monkeypatch.setattr(candidates, "make_plan", lambda device: TINY)
        monkeypatch.setattr(candidates, "make_candidates", lambda shipped, plan: chosen)
        monkeypatch.setattr(triton_report, "inspect_variants", static(problems, []))
        code = main(["sweep", "--device", "cpu", "--minutes", "60", "--out", str(tmp_path), *arguments])
        return code, report.read(tmp_path)

    return run


def test_a_candidate_that_fails_leaves_the_others_timed(run: Any, tmp_path: Path) -> None:
    chosen = [
        Candidate(SHIPPED),
        Faulty("wrong", config=SMALL, kind=Wrong),
        Faulty("restless", config=SMALL, kind=Restless),
        Faulty("late", config=SMALL, kind=Late),
        Faulty("broken", config=SMALL, kind=OutOfResource),
        Candidate("spills", config=replace(SMALL, block_n=128)),
        Candidate("no figures", config=replace(SMALL, block_n=256)),
        Candidate("CUDA", cuda=True),
        Candidate("good", config=SMALL, blocks=(16, 32)),
    ]
    problems = {128: ["12 spills, 48 bytes of stack"], 256: [f"{triton_report.NO_FIGURES}: nvdisasm"]}
    code, results = run(chosen, problems)
    assert code == 0
    trials = {trial.candidate: trial for trial in results.trials}
    assert list(trials) == [c.name for c in chosen]
    assert {name for name, trial in trials.items() if trial.ms} == {SHIPPED, "no figures", "good"}
    assert {name for name, trial in trials.items() if trial.block_ms} == {SHIPPED, "no figures", "good"}
    assert all(bool(trial.note) == (trial.ms is None) for trial in trials.values())
    assert "dx errs by" in trials["wrong"].note
    assert trials["restless"].note.endswith("1 of 1 repeats give other bits")
    assert trials["late"].note.startswith("dx_error 1.0 at B=32")
    assert trials["broken"].note == "RuntimeError: out of resource: shared memory"
    assert trials["spills"].note == "12 spills, 48 bytes of stack"
    assert trials["spills"].registers == 100
    assert trials["no figures"].registers is None
    assert "expected a CUDA device" in trials["CUDA"].note
    assert trials["CUDA"].tile == "128x128"
    good = trials["good"]
    assert (good.tile, good.block, good.shared_kib) == ("32x32x16 4w 2s", "16 × 32", 2.0)
    assert good.of_shipped
    assert good.floor_ratio
    assert trials[SHIPPED].of_shipped == 1.0
    text = (tmp_path / "results.md").read_text()
    assert "### What to ship" in text
    assert "| spills " in text
    with (tmp_path / "candidates.csv").open() as file:
        assert [row["candidate"] for row in csv.DictReader(file)] == list(trials)
    # The floor and each that is timed are in the table that every benchmark writes.
    assert {row.contender for row in results.rows if row.ms} == {"floor", SHIPPED, "no figures", "good"}
    assert {rate.name for rate in results.rates} >= {"x·yᵀ", f"block ({DIAGONAL}, good)"}


def test_what_is_shipped_must_be_right(run: Any) -> None:
    code, results = run([Faulty(SHIPPED, kind=Wrong), Candidate("good", config=SMALL)], {})
    assert code == 1
    assert [bool(trial.ms) for trial in results.trials] == [False, True]
    assert results.conclusions[1:] == [f"{DIAGONAL}: keep what is shipped; nothing was timed beside it"]


def test_what_time_does_not_allow_is_named(run: Any) -> None:
    code, results = run([Candidate(SHIPPED)], {}, "--minutes", "0")
    assert code == 0
    assert results.left_out == [f"{TINY.problems[0]}, {DIAGONAL}: no time left"]
    assert not results.trials


def test_candidates_are_chosen_by_name(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [Candidate(SHIPPED), Candidate("a", config=SMALL), Candidate("b", config=SMALL)]
    _, results = run(chosen, {}, "--candidates", "b")
    assert [trial.candidate for trial in results.trials] == [SHIPPED, "b"]
    with pytest.raises(SystemExit):
        run(chosen, {}, "--candidates", "c")
    assert "no such candidates: ['c']" in capsys.readouterr().err


def test_every_kernel_of_a_sweep_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that the checks and the timings launch, each with the candidate's own configuration."""
    needs_interpreter()
    from siglip_kernels.backends.triton import launch

    seen: list[Variant] = []
    launched: list[Variant] = []
    constants = launch._constants
    monkeypatch.setattr(launch, "_constants", lambda variant: launched.append(variant) or constants(variant))
    monkeypatch.setattr(candidates, "make_plan", lambda device: TINY)
    chosen = [Candidate(SHIPPED), Candidate("blocks", DIAGONAL, SMALL, (16, 32)), Candidate("ids", IDS, SMALL)]
    monkeypatch.setattr(candidates, "make_candidates", lambda shipped, plan: chosen)
    monkeypatch.setattr(triton_report, "inspect_variants", static({}, seen))
    assert main(["sweep", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert len(seen) == len(set(seen)) > 3
    assert set(launched) == set(seen)
    assert SMALL in {variant.config for variant in seen}


def trial(use: str, D: int, name: str, of_shipped: float | None) -> Trial:
    return Trial(use, D, name, "tile", "block", of_shipped=of_shipped)


@pytest.mark.parametrize(
    ("ratios", "conclusion"),
    [
        ({"a": (0.9, 0.95), "b": (0.99, 0.8)}, "ship b: it takes 0.990 at D = 768, 0.800 at D = 1152"),
        ({"a": (0.9, 1.01)}, "keep what is shipped; the best other, a, takes 0.900 at D = 768, 1.010 at D = 1152"),
        ({"a": (0.99, 0.99)}, "keep what is shipped; the best other, a, takes 0.990 at D = 768, 0.990 at D = 1152"),
        ({"a": (0.5, None), "b": (0.9, 0.9)}, "ship b: it takes 0.900 at D = 768, 0.900 at D = 1152"),
    ],
)
def test_what_to_ship(ratios: dict[str, tuple[float | None, ...]], conclusion: str) -> None:
    """The most gained over all widths, and lost at none."""
    trials = [trial(DIAGONAL, D, SHIPPED, 1.0) for D in (768, 1152)]
    trials += [
        trial(DIAGONAL, D, name, r) for name, by_D in ratios.items() for D, r in zip((768, 1152), by_D, strict=True)
    ]
    trials += [trial(IDS, 768, SHIPPED, 1.0), trial(IDS, 768, "c", None)]
    assert sweep.conclusions(trials) == [
        f"{DIAGONAL}: {conclusion} of the shipped time",
        f"{IDS}: keep what is shipped; nothing was timed beside it",
    ]
