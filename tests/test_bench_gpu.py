"""``python -m bench gpu`` and its checks, on the CPU at small sizes; and the README's generated tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.compile_fx  # here and not in a test, whose collections of garbage would search it all

from bench import accuracy, ceilings, checks, gpu, measure, problems, readme, report
from bench.__main__ import main
from bench.contenders import Contender, eager, ours
from bench.problems import FULL, Problem
from bench.session import Session
from siglip_kernels import backends, testing
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.testing import make_inputs

CPU = torch.device("cpu")
TINY = (40, 50, 16)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, report.Results]]:
    def run(*arguments: str) -> tuple[int, report.Results]:
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
    plan = problems.plan(CPU)
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
    assert measured == {(p.mode, p.B, p.D) for p in (*plan.compared, plan.largest)}
    names = {f"ours ({name})" for name in ours(plan.largest, CPU)}
    assert {row.contender for row in results.rows if row.B == plan.compared[0].B} == {"floor", "eager", *names}
    largest = [row for row in results.rows if row.B == plan.largest.B]
    assert {row.contender for row in largest} == names
    for row in largest:
        assert 0 < row.dx_error < 1e-5
        assert 0 < row.dy_error < 1e-5
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "### Checks" in (tmp_path / "results.md").read_text()


class Wrong(EagerBlockKernel):
    """Loses a row of dz."""

    def block(self, *args: Any, **out: Any) -> None:
        super().block(*args, **out)
        if out["dz"] is not None:
            out["dz"][-1] = 0


class Broken(EagerBlockKernel):
    """Does not run at all."""

    def block(self, *args: Any, **out: Any) -> None:
        raise RuntimeError("no such instruction")


@pytest.mark.parametrize("kernel", [Wrong, Broken])
def test_a_backend_that_fails_a_check_leaves_the_others_timed(
    kernel: type[EagerBlockKernel], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    others = {f"ours ({name})" for name in ours(PLAN.largest, CPU) if name != "eager"}
    if not others:
        pytest.skip("there is no other backend here")
    code, results = run()
    assert code == 1
    assert {c["backend"] for c in results.checks if c["wrong"]} == {"eager"}
    # The checks after the one that failed are run too.
    assert {c["check"] for c in results.checks if c["backend"] == "eager"} == {c["check"] for c in results.checks}
    measured = {(row.contender, row.B) for row in results.rows if row.ms}
    assert {name for name, B in measured if B == PLAN.compared[0].B} == {"floor", "eager", *others}
    assert {name for name, B in measured if B == PLAN.largest.B} == others
    assert {rate.name for rate in results.rates} >= {"x·yᵀ", *(f"block {name[5:]}" for name in others)}
    assert not any("(eager)" in rate.name for rate in results.rates)
    assert any(line.startswith("ours (eager) in float32 is not timed: eager ") for line in results.left_out)


def test_a_failure_in_one_dtype_is_none_in_another(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def many_pairs(backend: str, device: Any, dtype: torch.dtype, *sizes: int) -> list[str]:
        return ["too many"] if (backend, dtype) == ("eager", torch.bfloat16) else []

    monkeypatch.setattr(checks, "many_pairs", many_pairs)
    monkeypatch.setattr(testing, "check", lambda *arguments, **how: testing.Report())
    code, results = run()
    assert code == 1
    assert "ours (eager)" in {row.contender for row in results.rows if row.ms}
    wrong = "eager torch.bfloat16 many pairs: too many"
    assert results.left_out == [f"ours (eager) in bfloat16 is not timed: {wrong}"]


def test_what_failed_a_check_is_left_out_in_its_dtype_alone() -> None:
    session = Session(CPU, Path(), None, 0.0, report.Results({}))
    session.reject("triton", torch.bfloat16, ["wrong", "and more"])
    session.reject("triton", torch.bfloat16, ["later"])
    session.reject("eager", torch.float16, ["wrong"])
    assert session.left_out(Problem(8, 8, torch.bfloat16)) == ["ours (triton)", "ours (triton), graph"]
    assert session.left_out(Problem(8, 8, torch.float32)) == []
    assert session.failed == ["wrong", "and more", "later", "wrong"]
    assert session.results.left_out[0] == "ours (triton) in bfloat16 is not timed: wrong"
    assert len(session.results.left_out) == 2


def test_what_time_does_not_allow_is_named(run: Callable[..., Any]) -> None:
    code, results = run("--minutes", "0.001")
    assert code == 0
    assert results.left_out == [f"{p}: no time left" for p in problems.plan(CPU).compared]
    assert {row.B for row in results.rows} == {problems.plan(CPU).largest.B}


def test_a_rival_that_ran_out_of_memory_tries_no_larger_batch(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def hungry(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        tried.append(len(x))
        if len(x) > 60:
            raise torch.OutOfMemoryError("no room")
        return eager(x, *rest)

    entrants = [Contender("floor", None), Contender("ours (eager)", eager, ours=True), Contender("hungry", hungry)]
    compared = tuple(Problem(B, 8, torch.float32) for B in (48, 64, 80))
    monkeypatch.setattr(measure, "contenders", lambda *arguments: entrants)
    monkeypatch.setattr(problems, "plan", lambda device: replace(PLAN, compared=compared))
    _, results = run()
    rows = {row.B: row for row in results.rows if row.contender == "hungry" and row.B in (48, 64, 80)}
    assert set(tried) == {48, 64}
    assert rows[48].ms
    assert rows[64].note == "n/a: OutOfMemoryError: no room"
    assert rows[80].note == "n/a: out of memory at B = 64"


PLAN = problems.plan(CPU)


def test_a_failing_step_does_not_hide_the_others(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(ceilings, "copy_rate", broken)
    code, results = run()
    assert code == 1
    assert results.rows


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "no CUDA device here" in capsys.readouterr().err


def test_the_plan_for_a_gpu_is_the_issue_s() -> None:
    plan = problems.plan(torch.device("cuda"))
    full = {(p.B, p.D) for p in plan.compared if p.mode == FULL}
    assert full == {(2**k, D) for k in range(10, 19) for D in (768, 1024, 1152)}
    assert {p.mode for p in plan.compared} == set(problems.PRODUCTS)
    assert len(plan.compared) == len(set(plan.compared))
    assert plan.many_pairs**2 > 2**31
    assert (plan.largest.B, plan.largest.D) == (1_048_576, 768)


class Uncounted(EagerBlockKernel):
    """Its statistics miss a pair, or a block's least logit."""

    def block(self, *args: Any, **out: Any) -> None:
        super().block(*args, **out)
        if out.get("stats") is not None:
            out["stats"][self.index] += self.change

    def __init__(self, index: int = 0, change: float = 0.0) -> None:
        super().__init__()
        self.index, self.change = index, change


@pytest.mark.parametrize(
    ("index", "change", "wrong"),
    [
        (0, 0.0, set()),
        (0, 1.0, {"positive_mean"}),
        (2, 1.0, {"positive_mean", "positive_count"}),
        (3, -1.0, {"negative_mean", "negative_count"}),
        (5, -0.01, {"negative_min"}),
    ],
)
def test_logit_stats(index: int, change: float, wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", Uncounted(index, change))
    found = checks.logit_stats("eager", CPU, torch.float32, ["diagonal", "soft targets"], TINY)
    assert {line.split()[-4] for line in found if line.startswith("diagonal")} == wrong
    assert {line.split()[-4] for line in found} >= wrong


class Restless(EagerBlockKernel):
    """Gives other bits every other time."""

    calls = 0

    def block(self, *args: Any, **out: Any) -> None:
        super().block(*args, **out)
        self.calls += 1
        if self.calls % 2:
            out["dz"][3, 5] *= 1 + 1e-6


class Unwritten(EagerBlockKernel):
    """Leaves an element of dz as it was."""

    def block(self, *args: Any, **out: Any) -> None:
        kept = out["dz"][3, 5].clone()
        super().block(*args, **out)
        out["dz"][3, 5] = kept


@pytest.mark.parametrize(("kernel", "wrong"), [(EagerBlockKernel, 0), (Restless, 20), (Unwritten, 40)])
def test_repeats(kernel: type[EagerBlockKernel], wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    found = checks.repeats("eager", CPU, torch.float32, TINY)
    assert len(found) >= wrong
    assert bool(found) == bool(wrong)


@pytest.mark.parametrize(("kernel", "wrong"), [(EagerBlockKernel, set()), (Wrong, {"dx_error", "dy_error"})])
def test_many_pairs(kernel: type[EagerBlockKernel], wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    # 128 sampled rows of 128: the last one too.
    found = checks.many_pairs("eager", CPU, torch.float32, 128, 16)
    assert {line.split()[0] for line in found} == wrong


def test_the_loss_is_left_out_where_float64_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LOSS_PAIRS", 40 * 40)
    for B, formed in ((40, True), (41, False)):
        inputs = make_inputs(B, B, 8, torch.float32)
        gold = accuracy.gold(inputs)
        assert (gold.loss is not None) == formed
        assert (accuracy.errors(gold, torch.zeros(()), inputs)["loss_error"] is not None) == formed


def test_rates_count_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "interleaved", lambda steps, *rest: {name: [0.5] for name in steps})
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1000)
    assert ceilings.copy_rate(CPU, 0).rate == pytest.approx(2 * 1000 / 0.5 / 1e12)
    kernels = {"a": EagerBlockKernel(), "b": EagerBlockKernel()}
    rates = ceilings.block_rates(kernels, Problem(96, 16, torch.float32), CPU, 0)
    # The products once, for both kernels have blocks of one shape.
    assert [rate.rate for rate in rates] == pytest.approx([2 * 96 * 96 * 16 / 0.5 / 1e12] * (3 + 2 * 3))
    ids = torch.arange(96)
    rates = ceilings.block_rates(kernels, Problem(96, 16, torch.float32), CPU, 0, PairSpec(None, ids, ids))
    assert [rate.name for rate in rates][3:] == ["block (a)", "block (b)"]
    monkeypatch.undo()
    assert ceilings.block_rates({}, Problem(96, 16, torch.float32), CPU, 0) == []  # all of them failed a check


def test_workspace_curve_takes_the_bound() -> None:
    """Under Triton's interpreter: half the workspace, about half the peak of a problem much larger than it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    # Of the interpreter's time a problem of four tiles takes a quarter, and is cut in the same two ways.
    bounds = ceilings.workspace_curve(Problem(256, 16, torch.float32), CPU, 0.0, (0.0625, 1.0))
    assert [bound.dz_mib for bound in bounds] == [0.0625, 1.0]
    assert all(bound.ms > 0 for bound in bounds)
    call = backends.base.Problem(512, 512, 16, torch.float32, CPU)
    assert TritonBlockKernel(2**16).block_shape(call) == (128, 128)
    assert TritonBlockKernel(2**20).block_shape(call) == (512, 512)


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = report.Results(
        {"device": "a", "torch": "2"},
        checks=[{"check": "c", "backend": "eager", "dtype": "float32", "wrong": ["x"]}],
        rates=[ceilings.Rate("copy", "1", 1.0, 0.5, 2.0, 3.0)],
        bounds=[ceilings.Bound(16, 1.0, 0.5, 2.0, None)],
        rows=[report.Row(FULL, "float32", 8, 4, "eager", 1.0, 0.5, 2.0)],
        trials=[report.Trial("diagonal", 4, "shipped", "tile", "block", 168, 0, 96.0, 1.0, 0.5, 2.0, 0.9)],
        conclusions=["keep it"],
        left_out=["B=9"],
        seconds={"a": 1.0},
    )
    report.write(results, tmp_path)
    assert report.read(tmp_path) == results
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["B"] == 8
    assert (tmp_path / "candidates.csv").read_text().splitlines()[0].endswith("note,device,torch")


def test_the_readme_s_tables_are_those_of_the_results() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.filled(text) == text
    named = [folder for folder in (readme.ROOT / "bench" / "results").iterdir() if f"results/{folder.name}:" in text]
    assert named


def test_a_table_is_filled_in(tmp_path: Path) -> None:
    rows = [
        report.Row(FULL, "bfloat16", 4096, 768, "floor", 2.0, 2.0, 2.0),
        report.Row(FULL, "bfloat16", 4096, 768, "ours (triton)", 4.0, 3.0, 5.0, floor_ratio=0.5, peak_mib=10.0),
        report.Row(FULL, "bfloat16", 4096, 768, "eager", 8.0, 7.0, 9.0, times_ours=2.0, peak_mib=1234.0),
        report.Row(FULL, "bfloat16", 4096, 768, "eager, graph", 8.0, 7.0, 9.0, times_ours=2.0),
        report.Row(FULL, "bfloat16", 5000, 768, "ours (triton)", 4.0, 3.0, 5.0),
    ]
    about = {
        "device": "a GPU",
        "threads": "1",
        "torch": "2",
        "triton": "3",
        "commit": "abc",
        "date": "d",
        "driver": "5",
    }
    report.write(report.Results(about, rows=rows), tmp_path / "a-gpu")
    before = "text\n" + readme.BEGIN.format("a-gpu") + "old\n" + readme.END + "\nmore\n"
    after = readme.filled(before, tmp_path)
    assert "a GPU, driver 5, torch 2" in after
    (line,) = [line for line in after.splitlines() if "4,096" in line]
    assert [cell.strip() for cell in line.split("|")[5:10]] == ["4.00 (triton)", "0.50", "2.00", "10", "1,234"]
    assert "5,000" not in after
    assert "graph" not in after
    assert "old" not in after
    assert after.startswith("text\n")
    assert after.endswith("\nmore\n")
