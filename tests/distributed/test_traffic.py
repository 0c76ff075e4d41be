"""The bytes that the exchange between ranks sends, and the memory that it takes."""

from __future__ import annotations

import ctypes
import os
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.harness.timing import peak_bytes
from siglip_kernels import sigmoid_loss
from siglip_kernels.distributed import Exchange
from tests.distributed.batches import Batch, even, mesh_of, of_rank
from tests.ranks import Ranks

# Traffic


class Traffic:
    """Counts the bytes that a rank hands to torch.distributed, by function."""

    FUNCTIONS = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent = {"ring": 0, "all_gather": 0, "reduce_scatter": 0}
        for name in filter(lambda name: hasattr(dist, name), self.FUNCTIONS):
            monkeypatch.setattr(dist, name, self._counting(name, getattr(dist, name)))
        batched = dist.batch_isend_irecv

        def batch_isend_irecv(operations: list[Any]) -> Any:
            self.sent["ring"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
            return batched(operations)

        monkeypatch.setattr(dist, "batch_isend_irecv", batch_isend_irecv)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def function(out: Tensor, t: Tensor, group: Any) -> Any:
            self.sent["all_gather" if "gather" in name else "reduce_scatter"] += t.nbytes
            return original(out, t, group=group)

        return function


AGREEMENT = 8 * 20  # bytes: what a rank says before an exchange


def traffic(rank: int, group: Any, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """What a rank sends in forward, and in backward."""
    own, labels = of_rank(batch, rank)
    for t, wanted in zip(own, batch.requires_grad, strict=True):
        t.requires_grad_(wanted)
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = Traffic(monkeypatch)
        loss = sigmoid_loss(*own, **labels, process_group=Exchange(group, **batch.exchange))
        forward = dict(count.sent)
        loss.backward()
    return forward, {name: count.sent[name] - forward[name] for name in forward}


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_the_ring(ranks: Ranks, world: int, dtype: torch.dtype) -> None:
    b, D = 12, 40
    expected = {"ring": (world - 1) * b * D * (dtype.itemsize + 4), "all_gather": AGREEMENT, "reduce_scatter": 0}
    for forward, backward in ranks.run(world, traffic, even(world, b, D=D, dtype=dtype)):
        assert forward == expected
        assert not any(backward.values())


@pytest.mark.parametrize("world", [2, 8])
def test_bytes_of_the_gather(ranks: Ranks, world: int) -> None:
    """What the collectives are given: each sends (W - 1) / W of the gathered whole, or (W - 1) of the own part."""
    b, D = 12, 40
    expected = {"ring": 0, "all_gather": AGREEMENT + b * D * 4, "reduce_scatter": world * b * D * 4}
    for forward, backward in ranks.run(world, traffic, even(world, b, D=D, exchange={"algorithm": "gather"})):
        assert forward == expected
        assert not any(backward.values())


def test_frozen_texts_cost_no_gradient_traffic(ranks: Ranks) -> None:
    b, D, frozen = 12, 40, (True, False, True, True)
    for forward, backward in ranks.run(3, traffic, even(3, b, D=D, requires_grad=frozen)):
        assert forward["ring"] == 2 * b * D * 4
        assert not any(backward.values())
    for forward, _ in ranks.run(3, traffic, even(3, b, D=D, requires_grad=frozen, exchange={"algorithm": "gather"})):
        assert not forward["reduce_scatter"]


def test_half_precision_halves_the_gradient_traffic(ranks: Ranks) -> None:
    b, D = 12, 40
    batch = even(3, b, D=D, exchange={"text_gradient_dtype": torch.bfloat16})
    assert all(forward["ring"] == 2 * b * D * (4 + 2) for forward, _ in ranks.run(3, traffic, batch))


def test_upstream_gradients_that_differ_cost_traffic_in_backward(ranks: Ranks) -> None:
    b, D = 12, 40
    for forward, backward in ranks.run(3, traffic, even(3, b, D=D, exchange={"same_upstream": False})):
        assert forward["ring"] == 2 * b * D * 4
        assert backward["ring"] == 2 * b * D * (4 + 4)


def traffic_on_mesh(rank: int, group: Any, batch: Batch, nodes: int) -> tuple[dict[str, int], dict[str, int]]:
    return traffic(rank, mesh_of(nodes), batch)


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_bytes_over_nodes(ranks: Ranks, nodes: int) -> None:
    """As many as of one ring."""
    b, D = 12, 40
    for forward, backward in ranks.run(8, traffic_on_mesh, even(8, b, D=D), nodes):
        assert forward["ring"] == 7 * b * D * (4 + 4)
        assert not any(backward.values())


# Memory


def peak(rank: int, group: Any, b: int, D: int, algorithm: str) -> float:
    """Bytes above the inputs: the median of three steps."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**20)  # what is freed leaves the process, and does not hide in a heap
    x, y = (torch.ones(b, D, requires_grad=True) for _ in range(2))

    def step() -> None:
        x.grad = y.grad = None
        sigmoid_loss(x, y, 10.0, -10.0, process_group=Exchange(group, algorithm)).backward()

    step()
    peaks = []
    for _ in range(3):
        x.grad = y.grad = None
        found = peak_bytes(step, torch.device("cpu"))
        assert found is not None
        peaks.append(found)
    return statistics.median(peaks)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_memory_of_the_ring_does_not_grow_with_the_world(ranks: Ranks) -> None:
    two, eight = (max(ranks.run(world, peak, 1024, 512, "ring")) for world in (2, 8))
    assert eight <= 1.1 * two, (two, eight)
    # The measurement sees what grows.
    assert max(ranks.run(8, peak, 1024, 512, "gather")) > 1.5 * max(ranks.run(2, peak, 1024, 512, "gather"))
