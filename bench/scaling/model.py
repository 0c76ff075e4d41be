"""The loss over a process group as a model: when every rank of a ring, or of a gather, is done. Needs no GPU.

ring     Of N nodes with G ranks each; a ring of one level is one node. At step i of node o a rank works on the texts of
         a rank o nodes back, the i-th that come by (siglip_kernels/ring.py has the order), once they are there: from
         the rank before it (inner lane) or, the first of a node, from the node before (outer lane). It then sends them
         on round the node and, the first of every node, to the next node, which may take G steps. The sum of their
         gradients follows: at the end of a step a rank waits for the sum that the rank before sent at the end of its
         step before, adds what it computed, and sends it on; the last step of every node but the own sends it to the
         next node instead. Step 0 is the rank's own texts: a part of its images first, to compute beside the first
         transfer, the others last, beside the last.
gather   One all-gather, one block of all texts, one reduce-scatter; nothing overlaps.

Either begins with an agreement: an all-gather of 128 bytes by hops, round the node and then across nodes. A transfer
holds its link for latency + size / bandwidth, one at a time in each direction, in the order issued, and begins when
both ends have asked for it; lanes have links of their own. A rank waits for what it sends as for what it receives, as
two buffers in turn demand. Not modelled: passes over memory other than the block's, and whatever transfers take from
the computation beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
AGREEMENT_BYTES = 128


def after(N: int, G: int) -> list[NDArray[np.int64]]:
    """[N·G] to which rank each sends: on the inner lane, and on the outer."""
    ranks = np.arange(N * G).reshape(N, G)
    return [np.roll(ranks, -1, axis).ravel() for axis in (1, 0)]


@dataclass(frozen=True)
class Link:
    bandwidth: float  # bytes/s of each GPU in each direction
    latency: float  # s

    def seconds(self, size: int) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Ranks fill one node after another, so that a ring of all of them leaves every node by one link."""

    gpus: int  # of a node
    intra: Link  # within a node
    inter: Link  # between nodes, of each GPU

    def nodes(self, W: int) -> int:
        """Of a ring of two levels; 1, so that there is but one level, unless every node is full."""
        return 1 if W % self.gpus else W // self.gpus

    def hops(self, N: int, G: int, size: int) -> list[Array]:
        """[N·G] seconds of a transfer from each rank to the next: on the inner lane, and on the outer."""
        node = np.arange(N * G) // self.gpus
        return [np.where(node == node[to], self.intra.seconds(size), self.inter.seconds(size)) for to in after(N, G)]

    def agreement(self, N: int, G: int) -> float:
        """What a rank says reaches the others of its node over all links but one, and so does a node's, G times as
        much, the other nodes."""
        inner, _ = self.hops(N, G, AGREEMENT_BYTES)
        _, outer = self.hops(N, G, G * AGREEMENT_BYTES)
        lanes = inner.reshape(N, G), outer.reshape(N, G).T
        return float(sum((hops.sum(1) - hops.min(1)).max() for hops in lanes))

    def collective(self, W: int) -> Link:
        """The slowest link of a collective. NCCL lays a ring through every network card of a node, each for its share
        of the data (NVIDIA/nccl#601): a collective leaves a node by all its cards at once, our ring by one."""
        if self.gpus >= W:
            return self.intra
        return Link(min(self.intra.bandwidth, self.gpus * self.inter.bandwidth), self.inter.latency)


class Hops(NamedTuple):
    """Seconds from each rank to the next of its lane."""

    features: Array  # [W] a block's texts
    sums: Array  # [W] its text gradients


@dataclass(frozen=True)
class Ring:
    """What the time of a ring depends on, in seconds."""

    N: int  # nodes
    G: int  # ranks of a node
    block: Array | float  # [W, W] by rank and step, or what broadcasts to it
    inner: Hops
    outer: Hops  # not used by one node
    backward: bool = True  # whether there are text gradients
    overhead: float = 0.0  # of launches, for each block or part of one
    own_split: float = 0.5  # the share of the own block that is computed first
    agreement: float = 0.0

    @property
    def ranks(self) -> int:
        return self.N * self.G

    def blocks(self) -> Array:
        """[W, W]"""
        return np.broadcast_to(np.asarray(self.block, dtype=float), (self.ranks, self.ranks))

    def own(self) -> tuple[Array, Array]:
        """[W] the first and the last part of step 0."""
        first, last = (
            share * self.blocks()[:, 0] + bool(share) * self.overhead for share in (self.own_split, 1 - self.own_split)
        )
        return first, last

    def compute(self) -> Array:
        """[W] seconds in which a rank does not wait."""
        return sum(self.own()) + (self.blocks()[:, 1:] + self.overhead).sum(1)


class Links:
    """Of one lane, from each rank to the next."""

    def __init__(self, to: NDArray[np.int64], free: Array) -> None:
        self.to, self.sender = to, np.argsort(to)
        self.free = free  # when each link has done what it was asked to

    def shift(self, asked: Array, hops: Array) -> Array:
        """When each rank has both sent and received."""
        self.free = np.maximum(self.free, np.maximum(asked, asked[self.to])) + hops
        return np.maximum(self.free, self.free[self.sender])


def finish(ring: Ring) -> Array:
    """[W] seconds after which each rank is done: the events of ``scaling_events.py`` in max and plus, all at once."""
    N, G, blocks, (first, last) = ring.N, ring.G, ring.blocks(), ring.own()
    ready = np.full(ring.ranks, ring.agreement)
    inner, outer = (Links(to, ready) for to in after(N, G))
    # When what each lane moves has moved.
    inner_texts = outer_texts = inner_sums = outer_sums = ready
    for o in range(N):
        for i in range(G):
            if o or i:
                ready = np.maximum(ready, inner_texts if i else outer_texts)
            if i + 1 < G:
                inner_texts = inner.shift(ready, ring.inner.features)
            if o + 1 < N and i == (min(1, G - 1) if o == 0 else 0):
                outer_texts = outer.shift(ready, ring.outer.features)
            if o == i == 0:
                ready = ready + first
                continue
            ready = ready + blocks[:, o * G + i] + ring.overhead
            if not ring.backward:
                continue
            ready = np.maximum(ready, inner_sums)
            if i + 1 < G or o == 0:
                inner_sums = inner.shift(ready, ring.inner.sums)
            else:
                ready = np.maximum(ready, outer_sums)
                outer_sums = outer.shift(ready, ring.outer.sums)
    return np.maximum(ready + last, np.maximum(inner_sums, outer_sums))


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

    def ring(self, cluster: Cluster, nodes: int = 1) -> Ring:
        N, G = nodes, self.W // nodes
        features, sums = (cluster.hops(N, G, self._size(n)) for n in (self.feature_bytes, self.sum_bytes))
        inner, outer = map(Hops, features, sums)
        return Ring(
            N,
            G,
            self.block,
            inner,
            outer,
            backward=bool(self.sum_bytes),
            overhead=self.overhead,
            own_split=self.own_split,
            agreement=cluster.agreement(N, G),
        )

    def gather_compute(self) -> float:
        """Seconds: the texts of the ranks before, the own, those of the ranks after."""
        return self.W * self.block + min(self.W, 3) * self.overhead

    def gather(self, cluster: Cluster) -> float:
        """Seconds; either collective is W - 1 steps of a block each, none beside a computation."""
        link = cluster.collective(self.W)
        steps = sum(link.seconds(self._size(n)) for n in (self.feature_bytes, self.sum_bytes) if n)
        return cluster.agreement(1, self.W) + self.gather_compute() + (self.W - 1) * steps

    def ring_bytes(self, nodes: int = 1) -> int:
        """dx, dy, one contribution to a text gradient; two inboxes a lane; two sums on their way and, between nodes,
        two more and that of the own node. Without dz."""
        inboxes, sums = 2 * (nodes < self.W) + 2 * (nodes > 1), 2 + 3 * (nodes > 1)
        return self._size(12 * bool(self.sum_bytes) + inboxes * self.feature_bytes + sums * self.sum_bytes)

    def gather_bytes(self) -> int:
        """All texts and their gradients, these once more if they travel in half precision; dx, dy. Without dz."""
        if not self.sum_bytes:
            return self.W * self._size(self.feature_bytes)
        return self.W * self._size(self.feature_bytes + 4 + self.sum_bytes % 4) + self._size(4 + self.sum_bytes)

    def _size(self, element: int) -> int:
        return self.b * self.D * element
