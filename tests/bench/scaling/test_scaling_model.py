"""The model of the distributed loss: its two forms agree, and with cases done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.scaling.events import Simulation
from bench.scaling.model import Cluster, HopSeconds, Link, RingModel, Workload, completion_times

# 1 GB/s within a node of 4 and 0.1 GB/s between nodes: 1000 bytes take 1 + 1 µs and 3 + 10 µs.
SLOW = Cluster(4, Link(1e9, 1e-6), Link(1e8, 3e-6))


@pytest.mark.parametrize(
    ("N", "G"),
    [(1, W) for W in range(1, 17)] + [(N, 1) for N in (2, 3, 8)] + [(N, G) for N in (2, 3, 4, 5) for G in (2, 3, 4, 5)],
)
def test_events_and_recurrence_agree(N: int, G: int) -> None:
    W = N * G
    random = np.random.default_rng((N, G))
    for gpus in (1, 2, 3, 8, 16):
        for own_split in (0.0, 0.3, 0.5, 1.0):
            links = [Link(*random.uniform((200, 0), (4000, 0.4))) for _ in range(2)]
            cluster = Cluster(gpus, *links)
            block = random.uniform(0, 3) * random.uniform(0.1, 4, (W, W) if own_split else ())
            workload = Workload(W, 1, 400, block, random.uniform(0, 0.3), own_split=own_split)
            for sum_bytes in (4, 0):
                both = replace(workload, sum_bytes=sum_bytes).ring(cluster, N)
                np.testing.assert_allclose(completion_times(both), Simulation(both).run(), rtol=1e-12)


def lane(features: float, sums: float, W: int) -> HopSeconds:
    """Of equal links."""
    return HopSeconds(np.full(W, features), np.full(W, sums))


def ring(W: int, block: Any, features: float, sums: float | None, own_split: float = 0.5, **more: Any) -> RingModel:
    """Of one level and equal links; without sums forward only."""
    links = lane(features, sums or 0.0, W)
    return RingModel(1, W, block, links, links, backward=sums is not None, own_split=own_split, **more)


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
    two = ring(2, 10, 3, 4, own_split, overhead=1, handshake=2)
    assert completion_times(two).tolist() == [expected] * 2
    assert Simulation(two).run().tolist() == [expected] * 2


def test_one_late_rank_by_hand() -> None:
    """Three ranks, 2 a block; texts hop in 1, sums in 3. Rank 1 takes 20 for its step 1, which ends at 21.

    Its neighbours have had theirs since 3: what rank 0 sends it, and what it sends rank 2, moves from 21 to 24. Then
    all three have step 2 computed, and the last hop ends at 27, after the other half of the own block.
    """
    block = np.full((3, 3), 2.0)
    block[1, 1] = 20
    late = ring(3, block, 1, 3)
    assert completion_times(late).tolist() == Simulation(late).run().tolist() == [27] * 3


@pytest.mark.parametrize("W", [2, 3, 8, 13])
def test_what_is_hidden_and_what_is_not(W: int) -> None:
    """Blocks longer than both transfers hide all but the ends of the ring; those hide behind the parts of the own."""
    assert completion_times(ring(W, 10, 4, 5)).max() == pytest.approx(10 * W)
    assert completion_times(ring(W, 10, 4, 5, own_split=1.0)).max() == pytest.approx(10 * W + 5)
    assert completion_times(ring(W, 10, 4, 5, own_split=0.0)).max() == pytest.approx(10 * W + 4)
    assert completion_times(ring(W, 10, 4, None, own_split=1.0)).max() == pytest.approx(10 * W)
    # Without computation the transfers take turns on the links.
    assert completion_times(ring(W, 0, 4, 5)).max() == pytest.approx((W - 1) * (4 + 5))


@pytest.mark.parametrize(
    ("texts", "sums", "expected"),
    [
        # Half of the own block to 5, when the texts for the other node leave, to be there at 15; step 1 to 15, its sum
        # home at 17; steps 2 and 3 to 35, their sum in the other node at 40; the other half of the own block to 40.
        (10, 5, 40),
        (10, 7, 42),
        # Step 2 begins at 30.
        (25, 5, 55),
    ],
)
def test_two_nodes_of_two_by_hand(texts: float, sums: float, expected: float) -> None:
    four = RingModel(2, 2, 10, lane(1, 2, 4), lane(texts, sums, 4))
    assert completion_times(four).tolist() == Simulation(four).run().tolist() == [expected] * 4


@pytest.mark.parametrize("N", [2, 3, 7])
def test_a_transfer_between_nodes_hides_behind_the_blocks_of_a_node(N: int) -> None:
    def time(texts: float, sums: float, **more: Any) -> float:
        return completion_times(RingModel(N, 4, 10, lane(4, 5, 4 * N), lane(texts, sums, 4 * N), **more)).max() - 40 * N

    # The first texts leave for the next node a block late, the last sums have but half of the own block.
    assert time(30, 5) == pytest.approx(0)
    assert time(34, 5) == pytest.approx(4)
    assert time(30, 7) == pytest.approx(2)
    assert time(30, 7, own_split=1.0) == pytest.approx(7)
    assert time(35, 9, backward=False, own_split=1.0) == pytest.approx(5)


def test_ranks_of_one_place_in_their_nodes_fare_alike_in_a_large_world() -> None:
    workload = Workload(512, 1, 250, 5e-6)
    done = completion_times(workload.ring(SLOW)).reshape(-1, 4)
    assert (done == done[0]).all()
    # A border link carries 500 bytes of texts and 1000 of sums a step: 8 and 13 µs against 5 µs of computation.
    assert done.max() - SLOW.handshake(1, 512) == pytest.approx(511 * 21e-6, rel=0.01)
    # With two levels, as much for every 4 steps.
    levels = completion_times(workload.ring(SLOW, 128))
    assert (levels == levels[0]).all()
    assert levels.max() - SLOW.handshake(128, 4) == pytest.approx(128 * 21e-6, rel=0.01)


def test_a_ring_leaves_every_node_by_one_link() -> None:
    fast, slow = 2e-6, 13e-6
    np.testing.assert_allclose(SLOW.hop_seconds(1, 4, 1000)[0], [fast] * 4)
    np.testing.assert_allclose(SLOW.hop_seconds(1, 8, 1000)[0], [fast, fast, fast, slow] * 2)
    np.testing.assert_allclose(SLOW.hop_seconds(1, 6, 1000)[0], [fast, fast, fast, slow, fast, slow])
    np.testing.assert_allclose(SLOW.handshake(1, 6), 3 * (1e-6 + 128e-9) + 2 * (3e-6 + 1280e-9))
    assert SLOW.handshake(1, 1) == 0
    assert SLOW.collective_link(4) == SLOW.intra
    assert SLOW.collective_link(8) == Link(4e8, 3e-6)


def test_a_ring_of_two_levels_leaves_it_by_all() -> None:
    np.testing.assert_allclose(SLOW.hop_seconds(2, 4, 1000), [[2e-6] * 8, [13e-6] * 8])
    # Round the node by 3 hops of 128 bytes, then once to the other node with 512.
    np.testing.assert_allclose(SLOW.handshake(2, 4), 3 * (1e-6 + 128e-9) + 3e-6 + 5120e-9)
    assert [SLOW.ring_nodes(W) for W in (1, 2, 4, 6, 8, 12)] == [1, 1, 1, 1, 2, 3]


def test_gather_and_memory_by_hand() -> None:
    workload = Workload(8, 10, 50, block_seconds=1e-3, overhead=1e-4)
    # A block of 1000 bytes of texts and 2000 of gradients at 0.4 GB/s.
    assert workload.gather(SLOW) - SLOW.handshake(1, 8) == pytest.approx(
        8e-3 + 3e-4 + 7 * (3e-6 + 2.5e-6 + 3e-6 + 5e-6)
    )
    assert workload.ring_bytes() == 500 * (4 + 4 + 4 + 2 * 2 + 2 * 4)
    assert workload.ring_bytes(2) == 500 * (4 + 4 + 4 + 4 * 2 + 5 * 4)
    assert workload.gather_bytes() == 500 * (8 * (2 + 4) + 4 + 4)
    half, forward = Workload(8, 10, 50, 1e-3, sum_bytes=2), Workload(8, 10, 50, 1e-3, sum_bytes=0)
    assert (half.ring_bytes(), half.gather_bytes()) == (500 * (12 + 4 + 4), 500 * (8 * (2 + 4 + 2) + 4 + 2))
    assert (forward.ring_bytes(), forward.ring_bytes(2), forward.gather_bytes()) == (500 * 4, 500 * 8, 500 * 16)
    assert workload.ring(SLOW).backward
    assert not forward.ring(SLOW).backward
    assert forward.gather(SLOW) < half.gather(SLOW) < workload.gather(SLOW)
