"""``python -m bench scaling``: the report says what the model predicts, and that it is assumed."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.microbenchmark import report
from bench.microbenchmark.problems import FORWARD, FULL
from bench.microbenchmark.results import Results, Row
from bench.scaling import command
from bench.scaling.model import Cluster, Link, Workload, completion_times
from bench.scaling.prediction import HIDDEN_BELOW, measured_rate, smallest_hidden_batch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    sizes = ["--gpus", "8", "64", "--batches", "512", "4096", "16384"]
    assert main(["scaling", "--tflops", "600", *sizes, "--out", str(folder)]) == 0
    return folder


def test_the_report_names_its_rate_as_assumed(written: Path) -> None:
    saved = json.loads((written / "scaling.json").read_text())
    with (written / "scaling.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(saved["predicted"]) == 7  # 64 × 16,384 is in both sweeps
    assert all("assumed rate of 600.0 TFLOP/s" in line["rate"] for line in (saved["about"], *rows))
    text = (written / "scaling.md").read_text()
    assert "predictions of a model" in text
    assert "- rate: assumed" in text
    assert "- cluster: assumed" in text
    assert (written / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_what_the_model_predicts(written: Path) -> None:
    points = json.loads((written / "scaling.json").read_text())["predicted"]
    cluster = Cluster(8, Link(450e9, 5e-6), Link(50e9, 10e-6))
    for point in points:
        W, b = point["W"], point["b"]
        workload = Workload(W, b, 768, 6 * b * b * 768 / 600e12, 20e-6, own_split=1.0 if b == 512 else 0.5)
        for key, own_split in (("ring_ms", workload.own_split), ("own_first_ms", 1.0), ("own_last_ms", 0.0)):
            assert point[key] == pytest.approx(
                1000 * completion_times(replace(workload, own_split=own_split).ring(cluster)).max()
            )
        assert point["gather_ms"] == pytest.approx(1000 * workload.gather(cluster))
        assert point["compute_ms"] == pytest.approx(1000 * (W * workload.block_seconds + (W + (b > 512)) * 20e-6))
        assert point["two_level_ms"] == pytest.approx(1000 * completion_times(workload.ring(cluster, W // 8)).max())
        assert point["two_level_exposed"] == pytest.approx(1 - point["compute_ms"] / point["two_level_ms"])
        assert point["two_level_mib"] - point["ring_mib"] == (W > 8) * b * 768 * (2 * 2 + 3 * 4) / 2**20
        assert point["ring_exposed_ms"] == pytest.approx(point["ring_ms"] - point["compute_ms"])
        assert point["ring_exposed"] == pytest.approx(point["ring_exposed_ms"] / point["ring_ms"])
        assert (point["ring_exposed"] < HIDDEN_BELOW) == (b >= {8: 4096, 64: 16_384}[W])
        assert (point["two_level_exposed"] < HIDDEN_BELOW) == (b >= 4096)
    text = (written / "scaling.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["8", "4,096", "32,768", "4,096", "32,768"] in lines
    assert ["64", "16,384", "1,048,576", "4,096", "262,144"] in lines
    for name in ("flat", "two-level"):
        assert f"The {name} ring hides its traffic with GPUs × local batch of: 8 × 131,072, 64 × 16,384." in text
    # (2 + 4) bytes · 600e12 / (6 operations · bandwidth)
    assert "1,333 (within a node), 12,000 (between nodes)" in text
    assert "a node's 8 blocks as long as the transfers of one between nodes at 1,500" in text


def test_hidden_from_the_last_that_is_exposed_on() -> None:
    assert smallest_hidden_batch({1: 0.5, 2: 0.04, 4: 0.06, 8: 0.01, 16: 0.0}) == 8
    assert smallest_hidden_batch({1: 0.0, 2: 0.0}) == 1
    assert smallest_hidden_batch({1: 0.0, 2: HIDDEN_BELOW}) is None


def test_a_measured_rate_is_that_of_our_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(contender: str, B: int, tflops: float, mode: str = FULL, D: int = 768) -> Row:
        return Row(mode, "bfloat16", B, D, contender, tflops=tflops)

    rows = [row(f"ours ({name})", 1024, tflops) for name, tflops in (("a", 3.0), ("b", 4.0), ("c", 2.0), ("d", 1.0))]
    rows += [row("ours (b), graph", 1024, 9.0)]
    rows += [row("eager", 1024, 9.0), row("ours (a)", 8192, 5.0), row("ours (a)", 8192, 9.0, D=64)]
    rows += [row("ours (a)", 1024, 2.0, FORWARD)]
    about = {"device": "some device"}
    report.write(Results(about, rows=rows), tmp_path)
    rate = measured_rate(tmp_path, FULL, "bfloat16", 768)
    assert rate.tflops == {1024: 4.0, 8192: 5.0}
    assert [rate.at(b) for b in (1, 2048, 4096, 10**6)] == [4.0, 4.0, 5.0, 5.0]
    with pytest.raises(ValueError, match="no time of ours for forward \\+ backward, float32, D = 768"):
        measured_rate(tmp_path, FULL, "float32", 768)

    sizes = ["--gpus", "8", "--batches", "1024", "--out", str(tmp_path / "out")]
    assert main(["scaling", "--measured", str(tmp_path), *sizes, "--forward"]) == 0
    printed = capsys.readouterr().out
    assert "measured on some device, TFLOP/s: 2 at B = 1,024" in printed
    (small, _) = json.loads((tmp_path / "out" / "scaling.json").read_text())["predicted"]
    assert small["compute_ms"] == pytest.approx(1000 * 8 * (2 * 1024 * 1024 * 768 / 2e12 + 20e-6))


def test_a_rate_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scaling"])
    assert "--tflops" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert command.main(["--tflops", "1", "--gpus", "2", "--batches", "64", "--out", str(tmp_path)]) == 0
    assert "no plot" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.csv", "scaling.json", "scaling.md"]
