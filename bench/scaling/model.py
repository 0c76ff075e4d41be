"""A model of the loss over a process group: when each rank of a ring, or of a gather, is done. Needs no GPU.

ring     N nodes with G ranks each; a flat ring is one node. At step i of node o a rank works on the texts of a rank
         o nodes back, the i-th that arrive (siglip_kernels/ring.py has the order). They come from the previous rank
         (inner axis) or, the first of a node, from the previous node (outer axis). The rank then sends them on to the
         next rank and, the first of every node, to the next node, which may take G steps. The sum of their gradients
         follows: at the end of a step a rank waits for the sum that the previous rank sent at the end of its previous
         step, adds its own contribution, and sends the sum on; the last step of every node except the rank's own sends
         it to the next node instead. Step 0 is the rank's own texts: a part of its images first, overlapped with the
         first transfer, the others at the end, overlapped with the last.
gather   One all-gather, one block of all texts, one reduce-scatter; nothing overlaps.

Both begin with a handshake: an all-gather of 128 bytes, hop by hop, around the node and then across nodes. A transfer
occupies its link for latency + size / bandwidth, one at a time in each direction, in the order issued, and starts when
both ends have posted it; each axis has its own links. A rank waits for its sends as for its receives, because it
alternates between two buffers. Not modelled: memory passes other than the block's, and what transfers take from the
computation that overlaps them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
HANDSHAKE_BYTES = 128


def next_ranks(N: int, G: int) -> list[NDArray[np.int64]]:
    """[N·G] the rank to which each rank sends: on the inner axis and on the outer."""
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
    """Ranks fill one node after another, so a flat ring leaves every node over one link."""

    gpus_per_node: int
    intra: Link  # within a node
    inter: Link  # between nodes, for each GPU

    def ring_nodes(self, W: int) -> int:
        """Nodes of a two-level ring of W ranks; 1, a flat ring, unless every node is full."""
        return 1 if W % self.gpus_per_node else W // self.gpus_per_node

    def hop_seconds(self, N: int, G: int, size: int) -> list[Array]:
        """[N·G] seconds of a transfer from each rank to the next: on the inner axis and on the outer."""
        node = np.arange(N * G) // self.gpus_per_node
        return [
            np.where(node == node[to], self.intra.seconds(size), self.inter.seconds(size)) for to in next_ranks(N, G)
        ]

    def handshake(self, N: int, G: int) -> float:
        """Seconds of the all-gather: a rank's message crosses all links of its node but one, then a node's, G times as
        large, all links between nodes but one."""
        inner, _ = self.hop_seconds(N, G, HANDSHAKE_BYTES)
        _, outer = self.hop_seconds(N, G, G * HANDSHAKE_BYTES)
        axes = inner.reshape(N, G), outer.reshape(N, G).T
        return float(sum((hops.sum(1) - hops.min(1)).max() for hops in axes))

    def collective_link(self, W: int) -> Link:
        """The slowest link of a collective. NCCL builds a ring through every network card of a node, each for a share
        of the data (NVIDIA/nccl#601): a collective uses all cards of a node at once, our flat ring uses one."""
        if self.gpus_per_node >= W:
            return self.intra
        return Link(min(self.intra.bandwidth, self.gpus_per_node * self.inter.bandwidth), self.inter.latency)


class HopSeconds(NamedTuple):
    """Seconds of a transfer from each rank to the next on its axis."""

    features: Array  # [W] of a rank's texts
    sums: Array  # [W] of the sum of their gradients


@dataclass(frozen=True)
class RingModel:
    """Everything that the time of a ring depends on, in seconds."""

    N: int  # nodes
    G: int  # ranks in a node
    block_seconds: Array | float  # [W, W] by rank and step, or broadcastable to it
    inner: HopSeconds
    outer: HopSeconds  # unused with one node
    backward: bool = True  # whether there are text gradients
    overhead: float = 0.0  # of kernel launches, for each block or part of a block
    own_split: float = 0.5  # share of the rank's own block that is computed first
    handshake: float = 0.0

    @property
    def ranks(self) -> int:
        return self.N * self.G

    def block_matrix(self) -> Array:
        """[W, W] seconds by rank and step."""
        return np.broadcast_to(np.asarray(self.block_seconds, dtype=float), (self.ranks, self.ranks))

    def own_parts(self) -> tuple[Array, Array]:
        """[W] seconds of the first and the last part of step 0."""
        first, last = (
            share * self.block_matrix()[:, 0] + bool(share) * self.overhead
            for share in (self.own_split, 1 - self.own_split)
        )
        return first, last

    def compute_seconds(self) -> Array:
        """[W] seconds in which a rank computes."""
        return sum(self.own_parts()) + (self.block_matrix()[:, 1:] + self.overhead).sum(1)


class AxisLinks:
    """The links of one axis, from each rank to the next."""

    def __init__(self, to: NDArray[np.int64], free: Array) -> None:
        self.to, self.sender = to, np.argsort(to)
        self.free_at = free  # when each link has finished its transfers

    def shift(self, posted: Array, hops: Array) -> Array:
        """When each rank has both sent and received."""
        self.free_at = np.maximum(self.free_at, np.maximum(posted, posted[self.to])) + hops
        return np.maximum(self.free_at, self.free_at[self.sender])


def completion_times(ring: RingModel) -> Array:
    """[W] seconds until each rank is done: the events of ``events.py`` as max and plus over all ranks at once."""
    N, G, blocks, (first, last) = ring.N, ring.G, ring.block_matrix(), ring.own_parts()
    ready = np.full(ring.ranks, ring.handshake)
    inner, outer = (AxisLinks(to, ready) for to in next_ranks(N, G))
    # When the last transfer of each kind on each axis is complete.
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
class Workload:
    """One step of training: W ranks with b images and b texts each."""

    W: int
    b: int
    D: int
    block_seconds: float  # seconds for b × b pairs
    overhead: float = 0.0  # seconds of kernel launches for each block
    feature_bytes: int = 2
    sum_bytes: int = 4  # of an element of the text gradients that are sent; 0: forward only
    own_split: float = 0.5

    def ring(self, cluster: Cluster, nodes: int = 1) -> RingModel:
        N, G = nodes, self.W // nodes
        features, sums = (cluster.hop_seconds(N, G, self._size(n)) for n in (self.feature_bytes, self.sum_bytes))
        inner, outer = map(HopSeconds, features, sums)
        return RingModel(
            N,
            G,
            self.block_seconds,
            inner,
            outer,
            backward=bool(self.sum_bytes),
            overhead=self.overhead,
            own_split=self.own_split,
            handshake=cluster.handshake(N, G),
        )

    def gather_compute(self) -> float:
        """Seconds for the texts of the ranks before, the rank's own, and those of the ranks after."""
        return self.W * self.block_seconds + min(self.W, 3) * self.overhead

    def gather(self, cluster: Cluster) -> float:
        """Seconds; each collective takes W - 1 steps of one block, none overlapped with computation."""
        link = cluster.collective_link(self.W)
        steps = sum(link.seconds(self._size(n)) for n in (self.feature_bytes, self.sum_bytes) if n)
        return cluster.handshake(1, self.W) + self.gather_compute() + (self.W - 1) * steps

    def ring_bytes(self, nodes: int = 1) -> int:
        """dx, dy, one contribution to a text gradient; two receive buffers for each axis; two sums in transit and, with
        several nodes, two more and that of the own node. Without dz."""
        receive_buffers, sums = 2 * (nodes < self.W) + 2 * (nodes > 1), 2 + 3 * (nodes > 1)
        return self._size(12 * bool(self.sum_bytes) + receive_buffers * self.feature_bytes + sums * self.sum_bytes)

    def gather_bytes(self) -> int:
        """All texts and their gradients, twice if these are sent in half precision; dx, dy. Without dz."""
        if not self.sum_bytes:
            return self.W * self._size(self.feature_bytes)
        return self.W * self._size(self.feature_bytes + 4 + self.sum_bytes % 4) + self._size(4 + self.sum_bytes)

    def _size(self, element: int) -> int:
        return self.b * self.D * element
