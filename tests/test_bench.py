"""The benchmark reports what it says, refuses to time a wrong loss, and reads memory right."""

from __future__ import annotations

import csv
import math
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import accuracy, contenders, measure, timing
from bench.__main__ import main
from bench.problems import FORWARD, FROZEN, FULL, Problem
from bench.progress import Progress
from siglip_kernels import backends
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.testing import gold, make_inputs, relative_l2

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
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--contenders", "ours", "eager", "chunk_size=1024"]) == 0
    printed = capsys.readouterr().out
    for column in ("TFLOP/s", "floor ratio", "× our time", "peak MiB", "loss error", "dx error", "dy error"):
        assert column in printed
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [f"ours ({name})" for name in contenders.ours(Problem(96, 32, torch.float32), CPU)]
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
    def block(self, *args: Any, **out: Any) -> None:
        super().block(*args, **out)
        if out["dz"] is not None:
            out["dz"].mul_(1.01)


def test_a_wrong_gradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", Wrong())
    assert main(["--device", "cpu", "--batches", "64", "--dim", "8", "--out", str(tmp_path)]) == 1
    assert "nothing is timed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mib", [8, 64, 300])
def test_peak_memory_is_read_right(mib: int) -> None:
    """Allocations on either side of the C library's limit for keeping freed memory, after such a one was freed."""

    def step() -> None:
        torch.ones(mib * 2**20 // 4)

    step()
    peak = timing.peak_bytes(step, CPU)
    if peak is None:
        pytest.skip("peak memory cannot be read on this system")
    assert peak / 2**20 == pytest.approx(mib, rel=0.05, abs=1)


@pytest.mark.parametrize("name", ["eager", "chunked"])
def test_the_rivals_compute_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHUNK", 40)  # several chunks, the last ragged
    inputs = make_inputs(100, 100, 16, torch.float64)
    assert relative_l2(getattr(contenders, name)(*inputs), gold(inputs).loss) < 1e-12


def test_sampled_errors_are_those_of_the_whole() -> None:
    inputs = make_inputs(300, 300, 16, torch.float64)
    expected, sample = gold(inputs), accuracy.gold(inputs)
    assert relative_l2(sample.loss, expected.loss) < 1e-12
    assert relative_l2(sample.dx, expected.image_features[sample.rows]) < 1e-12
    assert relative_l2(sample.dy, expected.text_features[sample.rows]) < 1e-12


@pytest.mark.parametrize(("mode", "wanted"), [(FULL, 4), (FROZEN, 3), (FORWARD, 0)])
def test_a_mode_forms_its_gradients_and_no_others(mode: str, wanted: int) -> None:
    problem = Problem(32, 8, torch.float32, mode)
    step = contenders.Step(contenders.eager, problem, contenders.input_sets(problem, CPU))
    step()
    assert sum(leaf.grad is not None for leaf in step.leaves) == wanted
    assert math.isfinite(step.loss.detach())


@pytest.mark.parametrize(("mode", "products"), [(FULL, 3), (FROZEN, 2), (FORWARD, 1)])
def test_the_floor_is_the_products_of_the_mode(mode: str, products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(48, 8, torch.float64, mode)
    monkeypatch.setattr(contenders, "FLOOR_BYTES", 20 * 48 * 8)  # panels of 20 images, the last ragged
    floor = contenders.Floor(problem, contenders.input_sets(problem, CPU))
    floor()
    x, y = (t.detach() for t in floor.sets[0][:2])
    assert floor.z.shape == (20, 48)
    assert relative_l2(floor.z[:8], x[40:] @ y.T) < 1e-12
    panel = floor.dz
    dz = torch.cat([panel, panel, panel[:8]])
    if products > 1:
        assert relative_l2(floor.dy, dz.T @ x) < 1e-12
    if products > 2:
        assert relative_l2(floor.dx, dz @ y) < 1e-12


def test_the_other_project_is_called_by_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss takes the logarithm of the scale; where it is missing, the row says so."""
    module = types.ModuleType("siglip_kernel")
    module.fused_siglip_loss = lambda x, y, log_scale, bias: contenders.eager(x, y, log_scale.exp(), bias)  # type: ignore[attr-defined]
    inputs = make_inputs(20, 20, 8, torch.float64)
    monkeypatch.setitem(sys.modules, "siglip_kernel", module)
    assert relative_l2(contenders._siglip_kernel(*inputs), gold(inputs).loss) < 1e-12


def test_a_rival_that_cannot_run_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> None:
        raise RuntimeError("no room\nfor this")

    rivals = [
        contenders.Contender("floor", None),
        contenders.Contender("ours (eager)", contenders.eager, ours=True),
        contenders.Contender("broken", broken),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(measure, "contenders", lambda *arguments: rivals)
    rows = measure.measure(Problem(16, 8, torch.float32, FROZEN), CPU, 0.0, None, Progress(1))
    assert [(row.contender, row.note) for row in rows][2] == ("broken", "n/a: RuntimeError: no room")
    assert rows[2].ms is None
    assert rows[1].of_full is not None
    assert rows[1].of_full > 0
    monkeypatch.setattr(measure, "contenders", lambda *arguments: [rivals[0], replace(rivals[2], ours=True)])
    with pytest.raises(RuntimeError, match="no room"):
        measure.measure(Problem(16, 8, torch.float32), CPU, 0.0, None, Progress(1))


def test_rounds_are_interleaved() -> None:
    calls: list[str] = []
    steps = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    times = timing.interleaved(steps, CPU, seconds=0, min_rounds=3, before=lambda name: calls.append(f"before {name}"))
    assert [call for call in calls if "before" not in call] == ["a", "b", "b", "a", "a", "b"]
    assert calls[:2] == ["before a", "a"]
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
