"""The model runs the schedule of the code, and counts its buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.scaling.events import Simulation, Transfer
from bench.scaling.model import HopSeconds, RingModel, Workload
from siglip_kernels import ring as exchange
from siglip_kernels.pairs import PairSpec


class Recorded(Simulation):
    def shift(self, lane: str, rank: int, what: str, step: int) -> list[Transfer]:
        self.log.append(f"move {lane} {what}")
        return [Transfer(0.0, waiting=[f"{lane} {what}"])] * 2  # type: ignore[list-item]

    def record(self, rank: int) -> list[str]:
        self.log: list[str] = []
        for wanted in self.program(rank):
            waits = isinstance(wanted, Transfer)
            line = f"wait for {wanted.waiting[0]}" if waits else f"compute {wanted}"  # type: ignore[union-attr]
            if not (waits and self.log[-1] == line):
                self.log.append(line)
        return self.log


def world_and_texts(N: int, G: int, gives: bool = True) -> tuple[exchange.World, exchange.Texts]:
    """Of rank 1 of node 1, where there are such; 7 texts, D = 1."""
    lanes = exchange.Lane(1 % N, N), exchange.Lane(1 % G, G)
    world = exchange.World(*lanes, [7] * (N * G), [gives] * (N * G), torch.float32, torch.tensor(1.0))
    return world, exchange.Texts(torch.zeros(7, 1, dtype=torch.float16), None, None)


class Loop:
    def __init__(self, images: int, log: list[str]) -> None:
        self.x, self.log = torch.zeros(images, 1), log

    def empty(self, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(rows, 1, dtype=dtype)

    def add(self, *texts: Any, rows: slice | None = None, dy_begun: bool = False) -> None:
        images = len(self.x)
        self.log.append(f"compute {(rows.stop - rows.start) / images if rows else 1.0}")


SHAPES = [(1, 2), (1, 3), (1, 5), (2, 1), (3, 1), (2, 2), (2, 3), (3, 2), (4, 5)]


@pytest.mark.parametrize("gives", [True, False])
@pytest.mark.parametrize("images", [exchange.ENOUGH_TO_SPLIT, exchange.ENOUGH_TO_SPLIT - 1])
@pytest.mark.parametrize(("N", "G"), SHAPES)
def test_the_model_runs_the_schedule_of_the_code(
    N: int, G: int, images: int, gives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    world, own = world_and_texts(N, G, gives)

    def shift(lane: exchange.Lane, sent: Any, received: Any) -> list[str]:
        if lane.size == 1 or not sent[0].numel():
            return []
        what = "features" if sent[0].dtype == torch.float16 else "sums"
        moved = f"{'inner' if lane is world.inner else 'outer'} {what}"
        log.append(f"move {moved}")
        return [moved]

    monkeypatch.setattr(exchange.Lane, "shift", shift)
    monkeypatch.setattr(exchange, "wait", lambda works: log.extend(f"wait for {work}" for work in works))
    loop: Any = Loop(images, log)
    exchange.ring(world, loop, PairSpec(), own)
    own_split = 0.5 if gives and images >= exchange.ENOUGH_TO_SPLIT else 1.0
    links = HopSeconds(np.ones(N * G), np.ones(N * G))
    modelled = Recorded(RingModel(N, G, 1.0, links, links, gives, own_split=own_split)).record(1 % N * G + 1 % G)
    assert [line for line in modelled if line != "compute 0.0"] == log


@pytest.mark.parametrize("gives", [True, False])
@pytest.mark.parametrize(("N", "G"), SHAPES)
def test_the_model_counts_the_buffers_of_the_code(N: int, G: int, gives: bool) -> None:
    world, own = world_and_texts(N, G, gives)
    loop: Any = Loop(1, [])
    texts, sums = exchange.TextsRing(world, own), exchange.SumsRing(world, loop)
    held = [t for box in texts.inner_boxes + texts.outer_boxes for t in box.tensors()]
    held += [sums.part, *sums.inner_sums, *sums.outer_sums] + ([] if N == 1 else [sums.home])
    dx_dy = 7 * 8 * gives
    expected = Workload(N * G, 7, 1, 0.0, sum_bytes=4 * gives).ring_bytes(N)
    assert dx_dy + sum(t.numel() * t.element_size() for t in held) == expected
