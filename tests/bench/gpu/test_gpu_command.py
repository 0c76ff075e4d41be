"""``python -m bench gpu`` on the CPU at small sizes: every step leaves its results, whatever another one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import ceilings, checks, command
from bench.gpu import plan as plans
from bench.gpu.session import Session
from bench.microbenchmark import measure, problems, report
from bench.microbenchmark.contenders import Contender, backends_to_time, eager_loss
from bench.microbenchmark.problems import FULL, Problem
from bench.microbenchmark.results import Results
from siglip_kernels import backends, testing
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel
from tests.bench.gpu.faulty import LosesRow

CPU = torch.device("cpu")
PLAN = plans.make_plan(CPU)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, Results]]:
    def run(*arguments: str) -> tuple[int, Results]:
        common = ["--device", "cpu", "--minutes", "60", "--contenders", "ours", "eager", "--out", str(tmp_path)]
        code = main(["gpu", *common, *arguments])
        return code, report.read(tmp_path)

    return run


def test_every_step_leaves_its_results(run: Callable[..., Any], tmp_path: Path) -> None:
    code, results = run()
    assert code == 0
    assert list(results.seconds) == [
        "kernels compiled ahead",
        "checks in float32",
        "ceilings",
        "comparison",
        "checks in other dtypes",
        "largest batch",
    ]
    plan = plans.make_plan(CPU)
    assert {c["check"] for c in results.checks} == {
        "gradients against float64",
        "20 repeats give the same bits",
        "many pairs",
        "statistics of the logits",
    }
    assert {c["dtype"] for c in results.checks} == {"bfloat16", "float16", "float32"}
    assert all(rate.ms > 0 and rate.rate > 0 for rate in results.rates)
    assert {"copy", "x·yᵀ", "block (eager)"} <= {rate.name for rate in results.rates}
    measured = {(row.mode, row.B, row.D) for row in results.rows if row.ms}
    assert measured == {(p.mode, p.B, p.D) for p in (*plan.compared_problems, plan.largest_problem)}
    names = {f"ours ({name})" for name in backends_to_time(plan.largest_problem, CPU)}
    assert {row.contender for row in results.rows if row.B == plan.compared_problems[0].B} == {"floor", "eager", *names}
    largest = [row for row in results.rows if row.B == plan.largest_problem.B]
    assert {row.contender for row in largest} == names
    for row in largest:
        assert 0 < row.dx_error < 1e-5
        assert 0 < row.dy_error < 1e-5
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "### Checks" in (tmp_path / "results.md").read_text()


class Broken(EagerBlockKernel):
    """Does not run at all."""

    def block(self, task: BlockTask) -> None:
        raise RuntimeError("no such instruction")


@pytest.mark.parametrize("kernel", [LosesRow, Broken])
def test_a_backend_that_fails_a_check_leaves_the_others_timed(
    kernel: type[EagerBlockKernel], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    others = {f"ours ({name})" for name in backends_to_time(PLAN.largest_problem, CPU) if name != "eager"}
    if not others:
        pytest.skip("there is no other backend here")
    code, results = run()
    assert code == 1
    assert {c["backend"] for c in results.checks if c["wrong"]} == {"eager"}
    # The checks after the one that failed are run too.
    assert {c["check"] for c in results.checks if c["backend"] == "eager"} == {c["check"] for c in results.checks}
    measured = {(row.contender, row.B) for row in results.rows if row.ms}
    assert {name for name, B in measured if B == PLAN.compared_problems[0].B} == {"floor", "eager", *others}
    assert {name for name, B in measured if B == PLAN.largest_problem.B} == others
    assert {rate.name for rate in results.rates} >= {"x·yᵀ", *(f"block {name[5:]}" for name in others)}
    assert not any("(eager)" in rate.name for rate in results.rates)
    assert any(line.startswith("ours (eager) in float32 is not timed: eager ") for line in results.left_out)


def test_a_failure_in_one_dtype_is_none_in_another(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def index_overflow(backend: str, device: Any, dtype: torch.dtype, *sizes: int) -> list[str]:
        return ["too many"] if (backend, dtype) == ("eager", torch.bfloat16) else []

    monkeypatch.setattr(checks, "index_overflow", index_overflow)
    monkeypatch.setattr(testing, "check", lambda *arguments, **how: testing.Report())
    code, results = run()
    assert code == 1
    assert "ours (eager)" in {row.contender for row in results.rows if row.ms}
    wrong = "eager torch.bfloat16 many pairs: too many"
    assert results.left_out == [f"ours (eager) in bfloat16 is not timed: {wrong}"]


def test_what_failed_a_check_is_left_out_in_its_dtype_alone() -> None:
    session = Session(CPU, Path(), None, 0.0, Results({}))
    session.reject("triton", torch.bfloat16, ["wrong", "and more"])
    session.reject("triton", torch.bfloat16, ["later"])
    session.reject("eager", torch.float16, ["wrong"])
    assert session.excluded(Problem(8, 8, torch.bfloat16)) == ["ours (triton)", "ours (triton), graph"]
    assert session.excluded(Problem(8, 8, torch.float32)) == []
    assert session.failures == ["wrong", "and more", "later", "wrong"]
    assert session.results.left_out[0] == "ours (triton) in bfloat16 is not timed: wrong"
    assert len(session.results.left_out) == 2


def test_what_time_does_not_allow_is_named(run: Callable[..., Any]) -> None:
    code, results = run("--minutes", "0.001")
    assert code == 0
    assert results.left_out == [f"{p}: no time left" for p in PLAN.compared_problems]
    assert {row.B for row in results.rows} == {PLAN.largest_problem.B}


def test_a_rival_that_ran_out_of_memory_tries_no_larger_batch(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def hungry(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        tried.append(len(x))
        if len(x) > 60:
            raise torch.OutOfMemoryError("no room")
        return eager_loss(x, *rest)

    entrants = [Contender("floor", None), Contender("ours (eager)", eager_loss, ours=True), Contender("hungry", hungry)]
    compared = tuple(Problem(B, 8, torch.float32) for B in (48, 64, 80))
    monkeypatch.setattr(measure, "contenders_for", lambda *arguments: entrants)
    monkeypatch.setattr(plans, "make_plan", lambda device: replace(PLAN, compared_problems=compared))
    _, results = run()
    rows = {row.B: row for row in results.rows if row.contender == "hungry" and row.B in (48, 64, 80)}
    assert set(tried) == {48, 64}
    assert rows[48].ms
    assert rows[64].note == "n/a: OutOfMemoryError: no room"
    assert rows[80].note == "n/a: out of memory at B = 64"


def test_a_failing_step_does_not_hide_the_others(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(ceilings, "copy_bandwidth", broken)
    code, results = run()
    assert code == 1
    assert results.rows


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path)])
    assert "no CUDA device here" in capsys.readouterr().err


def test_the_plan_for_a_gpu_is_the_issue_s() -> None:
    plan = plans.make_plan(torch.device("cuda"))
    full = {(p.B, p.D) for p in plan.compared_problems if p.mode == FULL}
    assert full == {(2**k, D) for k in range(10, 19) for D in (768, 1024, 1152)}
    assert {p.mode for p in plan.compared_problems} == set(problems.GEMMS)
    assert len(plan.compared_problems) == len(set(plan.compared_problems))
    assert plan.overflow_batch**2 > 2**31
    assert (plan.largest_problem.B, plan.largest_problem.D) == (1_048_576, 768)
