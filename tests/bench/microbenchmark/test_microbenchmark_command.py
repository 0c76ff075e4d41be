"""``python -m bench`` reports what it says, refuses to time a wrong loss, and keeps to its time."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.microbenchmark import command, contenders, measure, report
from bench.microbenchmark.problems import FORWARD, FULL, Problem
from bench.microbenchmark.results import Row
from siglip_kernels import backends
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel

CPU = torch.device("cpu")


def test_it_writes_a_table_a_csv_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--device",
        "cpu",
        "--batches",
        "96",
        "160",
        "--dim",
        "32",
        "--seconds",
        "0.05",
        "--minutes",
        "60",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--contenders", "ours", "eager", "chunk_size=1024"]) == 0
    printed = capsys.readouterr().out
    for column in ("TFLOP/s", "floor ratio", "× our time", "peak MiB", "loss error", "dx error", "dy error"):
        assert column in printed
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [f"ours ({name})" for name in contenders.backends_to_time(Problem(96, 32, torch.float32), CPU)]
    assert ours[-1] == "ours (eager)"
    assert [r["contender"] for r in rows] == ["floor", *ours, "eager", "chunk_size=1024"] * 2
    for row in rows:
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
        assert float(row["floor_ratio"]) > 0
        assert row["torch"] == torch.__version__
        if row["contender"] != "floor":
            assert 0 <= float(row["loss_error"]) < 1e-5
            assert 0 < float(row["dx_error"]) < 1e-5
    assert (tmp_path / "results.md").read_text() in printed
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


class Wrong(EagerBlockKernel):
    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.dz is not None:
            task.dz.mul_(1.01)


def test_a_wrong_gradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", Wrong())
    assert main(["--device", "cpu", "--batches", "64", "--dim", "8", "--out", str(tmp_path)]) == 1
    assert "nothing is timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_ours_that_cannot_run_fails_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*inputs: Any) -> None:
        raise RuntimeError("no room")

    entrants = [
        contenders.Contender("floor", None),
        contenders.Contender("ours (broken)", broken, ours=True),  # type: ignore[arg-type]
        contenders.Contender("eager", contenders.eager_loss),
    ]
    monkeypatch.setattr(measure, "contenders_for", lambda *arguments: entrants)
    monkeypatch.setattr(command, "check_gradients", lambda *arguments: True)
    arguments = ["--device", "cpu", "--batches", "32", "--dim", "8", "--seconds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 1
    rows = {row.contender: row for row in report.read(tmp_path).rows}
    assert rows["eager"].ms
    assert rows["eager"].floor_ratio
    assert rows["eager"].times_ours is None
    assert rows["ours (broken)"].note == "n/a: RuntimeError: no room"


def test_what_time_does_not_allow_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "check_gradients", lambda *arguments: True)
    arguments = ["--device", "cpu", "--batches", "16", "--dim", "8", "--minutes", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert report.read(tmp_path).left_out == ["B=16 D=8 float32 forward + backward: no time left"]


def test_what_a_problem_will_take_is_known_from_a_smaller_one() -> None:
    rows = [
        Row(FULL, "float32", 8, 4, "a", ms=1000.0, rounds=3),
        Row(FULL, "float32", 16, 4, "a", ms=1500.0, rounds=3),
        Row(FULL, "float32", 16, 4, "b", ms=500.0, rounds=3),
        Row(FULL, "float32", 16, 4, "n/a"),
        Row(FULL, "bfloat16", 16, 4, "a", ms=9000.0, rounds=3),
        Row(FULL, "float32", 99, 4, "alone", ms=9000.0, rounds=1),
    ]
    assert command.estimate_seconds(Problem(32, 4, torch.float32), rows) == pytest.approx(5 * 2 * 4)
    assert command.estimate_seconds(Problem(16, 12, torch.float32, FORWARD), rows) == pytest.approx(5 * 2 * 3 / 3)
    assert command.estimate_seconds(Problem(32, 4, torch.float16), rows) == 0
