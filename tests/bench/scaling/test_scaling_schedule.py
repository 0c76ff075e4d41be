"""The model runs the schedule of the code, and counts its buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bench.scaling.events import Simulation, Transfer
from bench.scaling.model import HopSeconds, RingModel, Workload
from siglip_kernels.distributed import ring
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


def topology_and_texts(N: int, G: int, needs_text_grad: bool = True) -> tuple[ring.RingTopology, ring.TextShard]:
    """Of rank 1 of node 1, where there are such; 7 texts, D = 1."""
    topology = ring.RingTopology(
        outer=ring.RingAxis(1 % N, N),
        inner=ring.RingAxis(1 % G, G),
        sizes=[7] * (N * G),
        needs_text_grad=[needs_text_grad] * (N * G),
        grad_dtype=torch.float32,
        grad_scale=torch.tensor(1.0),
    )
    return topology, ring.TextShard(torch.zeros(7, 1, dtype=torch.float16), None, None)


class Loop:
    def __init__(self, images: int, log: list[str]) -> None:
        self.x, self.log = torch.zeros(images, 1), log

    def new_rows(self, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(rows, 1, dtype=dtype)

    def add(self, *texts: Any, rows: slice | None = None, accumulate_dy: bool = False) -> None:
        images = len(self.x)
        self.log.append(f"compute {(rows.stop - rows.start) / images if rows else 1.0}")


SHAPES = [(1, 2), (1, 3), (1, 5), (2, 1), (3, 1), (2, 2), (2, 3), (3, 2), (4, 5)]


@pytest.mark.parametrize("needs_text_grad", [True, False])
@pytest.mark.parametrize("images", [ring.MIN_IMAGES_TO_SPLIT, ring.MIN_IMAGES_TO_SPLIT - 1])
@pytest.mark.parametrize(("N", "G"), SHAPES)
def test_the_model_runs_the_schedule_of_the_code(
    N: int, G: int, images: int, needs_text_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    topology, own = topology_and_texts(N, G, needs_text_grad)

    def shift(axis: ring.RingAxis, sent: Any, received: Any) -> list[str]:
        if axis.size == 1 or not sent[0].numel():
            return []
        what = "features" if sent[0].dtype == torch.float16 else "sums"
        moved = f"{'inner' if axis is topology.inner else 'outer'} {what}"
        log.append(f"move {moved}")
        return [moved]

    monkeypatch.setattr(ring.RingAxis, "shift", shift)
    monkeypatch.setattr(ring, "wait", lambda works: log.extend(f"wait for {work}" for work in works))
    loop: Any = Loop(images, log)
    ring.ring(topology, loop, PairSpec(), own)
    own_split = 0.5 if needs_text_grad and images >= ring.MIN_IMAGES_TO_SPLIT else 1.0
    links = HopSeconds(np.ones(N * G), np.ones(N * G))
    modelled = Recorded(RingModel(N, G, 1.0, links, links, needs_text_grad, own_split=own_split)).record(
        1 % N * G + 1 % G
    )
    assert [line for line in modelled if line != "compute 0.0"] == log


@pytest.mark.parametrize("needs_text_grad", [True, False])
@pytest.mark.parametrize(("N", "G"), SHAPES)
def test_the_model_counts_the_buffers_of_the_code(N: int, G: int, needs_text_grad: bool) -> None:
    topology, own = topology_and_texts(N, G, needs_text_grad)
    loop: Any = Loop(1, [])
    texts, grads = ring.TextRing(topology, own), ring.GradRing(topology, loop)
    held = [t for buffer in texts.inner_buffers + texts.outer_buffers for t in buffer.tensors()]
    held += [grads.local, *grads.inner_buffers, *grads.outer_buffers] + ([] if N == 1 else [grads.own_node])
    dx_dy = 7 * 8 * needs_text_grad
    expected = Workload(N * G, 7, 1, 0.0, sum_bytes=4 * needs_text_grad).ring_bytes(N)
    assert dx_dy + sum(t.numel() * t.element_size() for t in held) == expected
