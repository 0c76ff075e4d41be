"""The loss over a process group as a model: when every rank of a ring, or of a gather, is done. Needs no GPU.

ring     At the start of step s, once the texts of the rank s before it are there, a rank sends them on and receives
         those of step s + 1, while it computes. The sum of a block's text gradients begins on the rank after its own:
         at the end of step s a rank waits for the sum that the rank before sent at the end of its step s - 1, adds what
         it computed, and sends it on; after step W - 1 it is home. Step 0 is the rank's own texts: a part of its images
         first, to compute beside the first transfer, the others last, beside the last.
gather   One all-gather, one block of all texts, one reduce-scatter; nothing overlaps.

Either begins with an agreement: an all-gather of 128 bytes, by W - 1 hops. A transfer holds its link for latency + size
/ bandwidth, one at a time in each direction, in the order issued, and begins when both ends have asked for it. A rank
waits for what it sends as for what it receives, as two buffers in turn demand. Not modelled: passes over memory other
than the block's, and whatever transfers take from the computation beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
AGREEMENT_BYTES = 128


@dataclass(frozen=True)
class Link:
    bandwidth: float  # bytes/s of each GPU in each direction
    latency: float  # s

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Ranks fill one node after another, so that a ring leaves every node by one link."""

    gpus: int  # of a node
    intra: Link  # within a node
    inter: Link  # between nodes, of each GPU

    def hops(self, W: int, size: int) -> Array:
        """[W] seconds of a transfer from each rank to the next."""
        rank = np.arange(W)
        within = rank // self.gpus == (rank + 1) % W // self.gpus
        return np.where(within, self.intra.seconds(size), self.inter.seconds(size))

    def agreement(self, W: int) -> float:
        """What a rank says reaches all others over all links but one."""
        hops = self.hops(W, AGREEMENT_BYTES)
        return float(hops.sum() - hops.min()) if W > 1 else 0.0

    def collective(self, W: int) -> Link:
        """The slowest link of a collective. NCCL lays a ring through every network card of a node, each for its share
        of the data (NVIDIA/nccl#601): a collective leaves a node by all its cards at once, our ring by one."""
        if self.gpus >= W:
            return self.intra
        return Link(min(self.intra.bandwidth, self.gpus * self.inter.bandwidth), self.inter.latency)


@dataclass(frozen=True)
class Ring:
    """What the time of a ring depends on, in seconds."""

    W: int
    block: Array | float  # [W, W] by rank and step, or what broadcasts to it
    features: Array  # [W] a block's texts, from each rank to the next
    sums: Array | None  # [W] its text gradients; None: forward only
    overhead: float = 0.0  # of launches, for each block or part of one
    own_split: float = 0.5  # the share of the own block that is computed first
    agreement: float = 0.0

    def blocks(self) -> Array:
        """[W, W]"""
        return np.broadcast_to(np.asarray(self.block, dtype=float), (self.W, self.W))

    def own(self) -> tuple[Array, Array]:
        """[W] the first and the last part of step 0."""
        first, last = (
            share * self.blocks()[:, 0] + bool(share) * self.overhead for share in (self.own_split, 1 - self.own_split)
        )
        return first, last

    def compute(self) -> Array:
        """[W] seconds in which a rank does not wait."""
        return sum(self.own()) + (self.blocks()[:, 1:] + self.overhead).sum(1)


def finish(ring: Ring) -> Array:
    """[W] seconds after which each rank is done: the events of ``scaling_events.py`` in max and plus, all at once."""
    blocks, (first, last) = ring.blocks(), ring.own()
    start = np.full(ring.W, ring.agreement)
    free = start  # when each link, from a rank to the next, has done what it was asked to

    def shift(asked: Array, hops: Array) -> Array:
        """When each rank has both sent and received."""
        nonlocal free
        free = np.maximum(free, np.maximum(asked, np.roll(asked, -1))) + hops
        return np.maximum(free, np.roll(free, 1))

    ready, summed = start + first, start
    moved = shift(start, ring.features) if ring.W > 1 else start
    for step in range(1, ring.W):
        ready = np.maximum(ready, moved)
        if step + 1 < ring.W:
            moved = shift(ready, ring.features)
        ready = ready + blocks[:, step] + ring.overhead
        if ring.sums is not None:
            ready = np.maximum(ready, summed)
            summed = shift(ready, ring.sums)
    return np.maximum(ready + last, summed)


@dataclass(frozen=True)
class Job:
    """One step of training: W ranks with b images and b texts each."""

    W: int
    b: int
    D: int
    block: float  # seconds of b × b pairs
    overhead: float = 0.0  # seconds of launches a block
    feature_bytes: int = 2
    sum_bytes: int = 4  # of an element of the text gradients between ranks; 0: forward only
    own_split: float = 0.5

    def ring(self, cluster: Cluster) -> Ring:
        features, sums = (cluster.hops(self.W, self._size(n)) for n in (self.feature_bytes, self.sum_bytes))
        back = sums if self.sum_bytes else None
        return Ring(self.W, self.block, features, back, self.overhead, self.own_split, cluster.agreement(self.W))

    def gather_compute(self) -> float:
        """Seconds: the texts of the ranks before, the own, those of the ranks after."""
        return self.W * self.block + min(self.W, 3) * self.overhead

    def gather(self, cluster: Cluster) -> float:
        """Seconds; either collective is W - 1 steps of a block each, none beside a computation."""
        link = cluster.collective(self.W)
        steps = sum(link.seconds(self._size(n)) for n in (self.feature_bytes, self.sum_bytes) if n)
        return cluster.agreement(self.W) + self.gather_compute() + (self.W - 1) * steps

    def ring_bytes(self) -> int:
        """dx, dy, one contribution to a text gradient; two inboxes, two sums on their way. Without dz."""
        return self._size(12 * bool(self.sum_bytes) + 2 * self.feature_bytes + 2 * self.sum_bytes)

    def gather_bytes(self) -> int:
        """All texts and their gradients, these once more if they travel in half precision; dx, dy. Without dz."""
        if not self.sum_bytes:
            return self.W * self._size(self.feature_bytes)
        return self.W * self._size(self.feature_bytes + 4 + self.sum_bytes % 4) + self._size(4 + self.sum_bytes)

    def _size(self, element: int) -> int:
        return self.b * self.D * element
