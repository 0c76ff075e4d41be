"""The model of the distributed loss: its two forms agree, with cases done by hand, and with the code's own schedule."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import report, scaling_report, scaling_validation
from bench.__main__ import main
from bench.problems import FORWARD, FULL
from bench.report import Results, Row
from bench.scaling import Cluster, Job, Link, Ring, finish
from bench.scaling_events import Simulation, Transfer
from bench.scaling_report import GLOBAL_BATCH, HIDDEN, hidden_from, measured_rate
from siglip_kernels import ring as exchange
from siglip_kernels.pairs import PairSpec

# 1 GB/s within a node of 4 and 0.1 GB/s between nodes: 1000 bytes take 1 + 1 µs and 3 + 10 µs.
SLOW = Cluster(4, Link(1e9, 1e-6), Link(1e8, 3e-6))


@pytest.mark.parametrize("W", range(1, 17))
def test_events_and_recurrence_agree(W: int) -> None:
    random = np.random.default_rng(W)
    for gpus in (1, 2, 3, 8, 16):
        for own_split in (0.0, 0.3, 0.5, 1.0):
            links = [Link(*random.uniform((200, 0), (4000, 0.4))) for _ in range(2)]
            cluster = Cluster(gpus, *links)
            block = random.uniform(0, 3) * random.uniform(0.1, 4, (W, W) if own_split else ())
            features, sums = cluster.hops(W, 800), cluster.hops(W, 1600)
            for back in (sums, None):
                ring = Ring(W, block, features, back, random.uniform(0, 0.3), own_split, cluster.agreement(W))
                np.testing.assert_allclose(finish(ring), Simulation(ring).run(), rtol=1e-12)


def ring(W: int, block: float, features: float, sums: float | None, own_split: float = 0.5, **more: Any) -> Ring:
    """Of equal links."""
    back = None if sums is None else np.full(W, sums)
    return Ring(W, block, np.full(W, features), back, own_split=own_split, **more)


@pytest.mark.parametrize(
    ("own_split", "expected"),
    [
        # From 2 on: half of the own block to 8; step 1 to 19; the other half to 25, the sum home at 23.
        (0.5, 25),
        # The own block to 13; step 1 to 24; the sum home at 28.
        (1.0, 28),
        # Texts at 5; step 1 to 16; the own block to 27.
        (0.0, 27),
    ],
)
def test_two_ranks_by_hand(own_split: float, expected: float) -> None:
    two = ring(2, 10, 3, 4, own_split, overhead=1, agreement=2)
    assert finish(two).tolist() == [expected] * 2
    assert Simulation(two).run().tolist() == [expected] * 2


def test_one_late_rank_by_hand() -> None:
    """Three ranks, 2 a block; texts hop in 1, sums in 3. Rank 1 takes 20 for its step 1, which ends at 21.

    Its neighbours have had theirs since 3: what rank 0 sends it, and what it sends rank 2, moves from 21 to 24. Then
    all three have step 2 computed, and the last hop ends at 27, after the other half of the own block.
    """
    block = np.full((3, 3), 2.0)
    block[1, 1] = 20
    late = Ring(3, block, np.full(3, 1.0), np.full(3, 3.0))
    assert finish(late).tolist() == Simulation(late).run().tolist() == [27] * 3


@pytest.mark.parametrize("W", [2, 3, 8, 13])
def test_what_is_hidden_and_what_is_not(W: int) -> None:
    """Blocks longer than both transfers hide all but the ends of the ring; those hide behind the parts of the own."""
    assert finish(ring(W, 10, 4, 5)).max() == pytest.approx(10 * W)
    assert finish(ring(W, 10, 4, 5, own_split=1.0)).max() == pytest.approx(10 * W + 5)
    assert finish(ring(W, 10, 4, 5, own_split=0.0)).max() == pytest.approx(10 * W + 4)
    assert finish(ring(W, 10, 4, None, own_split=1.0)).max() == pytest.approx(10 * W)
    # Without computation the transfers take turns on the links.
    assert finish(ring(W, 0, 4, 5)).max() == pytest.approx((W - 1) * (4 + 5))


def test_ranks_of_one_place_in_their_nodes_fare_alike_in_a_large_world() -> None:
    job = Job(512, 1, 250, 5e-6)
    done = finish(job.ring(SLOW)).reshape(-1, 4)
    assert (done == done[0]).all()
    # A border link carries 500 bytes of texts and 1000 of sums a step: 8 and 13 µs against 5 µs of computation.
    assert done.max() - SLOW.agreement(512) == pytest.approx(511 * 21e-6, rel=0.01)


def test_a_ring_leaves_every_node_by_one_link() -> None:
    fast, slow = 2e-6, 13e-6
    np.testing.assert_allclose(SLOW.hops(4, 1000), [fast] * 4)
    np.testing.assert_allclose(SLOW.hops(8, 1000), [fast, fast, fast, slow] * 2)
    np.testing.assert_allclose(SLOW.hops(6, 1000), [fast, fast, fast, slow, fast, slow])
    np.testing.assert_allclose(SLOW.agreement(6), 3 * (1e-6 + 128e-9) + 2 * (3e-6 + 1280e-9))
    assert SLOW.agreement(1) == 0
    assert SLOW.collective(4) == SLOW.intra
    assert SLOW.collective(8) == Link(4e8, 3e-6)


def test_gather_and_memory_by_hand() -> None:
    job = Job(8, 10, 50, block=1e-3, overhead=1e-4)
    # A block of 1000 bytes of texts and 2000 of gradients at 0.4 GB/s.
    assert job.gather(SLOW) - SLOW.agreement(8) == pytest.approx(8e-3 + 3e-4 + 7 * (3e-6 + 2.5e-6 + 3e-6 + 5e-6))
    assert job.ring_bytes() == 500 * (4 + 4 + 4 + 2 * 2 + 2 * 4)
    assert job.gather_bytes() == 500 * (8 * (2 + 4) + 4 + 4)
    half, forward = Job(8, 10, 50, 1e-3, sum_bytes=2), Job(8, 10, 50, 1e-3, sum_bytes=0)
    assert (half.ring_bytes(), half.gather_bytes()) == (500 * (12 + 4 + 4), 500 * (8 * (2 + 4 + 2) + 4 + 2))
    assert (forward.ring_bytes(), forward.gather_bytes()) == (500 * 4, 500 * 16)
    assert forward.ring(SLOW).sums is None
    assert forward.gather(SLOW) < half.gather(SLOW) < job.gather(SLOW)


class Recorded(Simulation):
    def shift(self, rank: int, what: str, step: int) -> list[Transfer]:
        self.log.append(f"move {what}")
        return [Transfer(0.0, waiting=[what])] * 2  # type: ignore[list-item]

    def record(self, rank: int) -> list[str]:
        self.log: list[str] = []
        for wanted in self.program(rank):
            waits = isinstance(wanted, Transfer)
            line = f"wait for {wanted.waiting[0]}" if waits else f"compute {wanted}"  # type: ignore[union-attr]
            if not (waits and self.log[-1] == line):
                self.log.append(line)
        return self.log


@pytest.mark.parametrize("images", [exchange.ENOUGH_TO_SPLIT, exchange.ENOUGH_TO_SPLIT - 1])
@pytest.mark.parametrize("W", [2, 3, 5])
def test_the_model_runs_the_schedule_of_the_code(W: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def shift(lane: Any, sent: Any, received: Any) -> list[str]:
        if lane.size == 1:
            return []
        what = "features" if sent[0].dtype == torch.float16 else "sums"
        log.append(f"move {what}")
        return [what]

    class Loop:
        x = torch.zeros(images, 1)

        def empty(self, rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            return torch.zeros(rows, 1)

        def add(self, *texts: Any, rows: slice = slice(0, images), dy_begun: bool = False) -> None:
            log.append(f"compute {(rows.stop - rows.start) / images}")

    monkeypatch.setattr(exchange.Lane, "shift", shift)
    monkeypatch.setattr(exchange, "wait", lambda works: log.extend(f"wait for {work}" for work in works))
    lanes = exchange.Lane(), exchange.Lane(1, W)
    world = exchange.World(*lanes, [7] * W, [True] * W, torch.float32, torch.tensor(1.0))
    own = exchange.Texts(torch.zeros(7, 1, dtype=torch.float16), None, None)
    loop: Any = Loop()
    exchange.ring(world, loop, PairSpec(), own)
    own_split = 0.5 if images >= exchange.ENOUGH_TO_SPLIT else 1.0
    modelled = Recorded(ring(W, 1.0, 1.0, 1.0, own_split)).record(1)
    assert [line for line in modelled if line != "compute 0.0"] == log


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
        job = Job(W, b, 768, 6 * b * b * 768 / 600e12, 20e-6, own_split=1.0 if b == 512 else 0.5)
        for key, own_split in (("ring_ms", job.own_split), ("own_first_ms", 1.0), ("own_last_ms", 0.0)):
            assert point[key] == pytest.approx(1000 * finish(replace(job, own_split=own_split).ring(cluster)).max())
        assert point["gather_ms"] == pytest.approx(1000 * job.gather(cluster))
        assert point["compute_ms"] == pytest.approx(1000 * (W * job.block + (W + (b > 512)) * 20e-6))
        assert point["ring_exposed_ms"] == pytest.approx(point["ring_ms"] - point["compute_ms"])
        assert point["ring_exposed"] == pytest.approx(point["ring_exposed_ms"] / point["ring_ms"])
        assert (point["ring_exposed"] < HIDDEN) == (b >= {8: 4096, 64: 16_384}[W])
    text = (written / "scaling.md").read_text()
    assert "| 8    | 4,096       | 32,768       |" in text
    assert "| 64   | 16,384      | 1,048,576    |" in text
    assert f"GPUs × local batch of: 8 × {GLOBAL_BATCH // 8:,}, 64 × 16,384." in text
    # (2 + 4) bytes · 600e12 / (6 operations · bandwidth)
    assert "1,333 (within a node), 12,000 (between nodes)" in text


def test_hidden_from_the_last_that_is_exposed_on() -> None:
    def points(**exposed: float) -> Any:
        return [SimpleNamespace(b=int(b[1:]), ring_exposed=share) for b, share in exposed.items()]

    assert hidden_from(points(b1=0.5, b2=0.04, b4=0.06, b8=0.01, b16=0.0)) == 8
    assert hidden_from(points(b1=0.0, b2=0.0)) == 1
    assert hidden_from(points(b1=0.0, b2=0.05)) is None


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
    assert scaling_report.main(["--tflops", "1", "--gpus", "2", "--batches", "64", "--out", str(tmp_path)]) == 0
    assert "no plot" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.csv", "scaling.json", "scaling.md"]


def test_a_trial_compares_the_slowest_ranks() -> None:
    """Round by round: the second has slower blocks and the same transfers."""
    transfers = {"ping small": [0.2] * 2, "ping": [2.0] * 2, "shift small": [0.1] * 2, "shift": [1.0] * 2}
    ranks = [
        {**transfers, "block": [10.0, 20.0], "ring": [31.0, 50.0], "gather": [22.0, 50.0]},
        {**transfers, "block": [5.0, 20.0], "ring": [42.2, 41.0], "gather": [24.0, 30.0]},
    ]
    found = scaling_validation.trial("ring", 250, 1000, ranks)
    # Whole own block, the next, and the hop home, after an agreement of 0.1: 21.1 and 41.1 for the slower rank.
    assert found.predicted_ms == pytest.approx(1000 * (21.1 + 41.1) / 2)
    assert found.measured_ms == pytest.approx(1000 * (42.2 + 50) / 2)
    assert found.ratio == pytest.approx(((42.2 / 21.1 + 50 / 41.1) / 2, 50 / 41.1, 42.2 / 21.1))
    assert (found.ping_us, found.ping_gb_s) == pytest.approx((1e5, 1e-3))
    assert (found.shift_us, found.shift_gb_s) == pytest.approx((1e5, 1e-3))
    gather = scaling_validation.trial("gather", 250, 1000, ranks)
    assert gather.predicted_ms == pytest.approx(1000 * (22.1 + 42.1) / 2)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_validation_runs_the_real_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling_validation.main(rounds=2, worlds=(2,), batches=(32, 48), D=16) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in lines[0]] == [*scaling_validation.Trial._fields]
    assert [[cell.strip() for cell in line[:3]] for line in lines[1:]] == [
        [algorithm, "2", b] for b in ("32", "48") for algorithm in ("ring", "gather")
    ]
    assert all(float(cell) > 0 for line in lines[1:] for cell in line[3:-1])
