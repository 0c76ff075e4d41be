"""The ring: texts travel from rank to rank, followed by the sum of their gradients.

With N nodes of G ranks each, rank (n, g) first works on the texts of its own node: (n, g), (n, g - 1), …. Then, for
o = 1, 2, …, it works on those of node n - o: (n - o, g - 1), (n - o, g - 2), …, (n - o, g - G). Texts are sent on
before they are worked on. They go round the node; the first of every node also go to the next node, and that transfer
may take as long as the whole way round. Every rank has its own link between nodes, and uses it.

The sum of their gradients begins on the rank after their owner, or on the first rank of another node. Every rank adds
its part on the way round that node. From the second node on, the sum of the previous nodes is added too. Both sums
return to the owner last. There are N·G - 1 transfers of texts and as many of gradients, for any N. A group without
nodes is one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import BlockLoop

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# From this number of images on, a rank splits its own block in two: one part overlaps with the first transfer, one with
# the last. Below, by the model of bench/scaling, the launches of one more block take longer than the time they hide.
MIN_IMAGES_TO_SPLIT = 2048


class TextShard(NamedTuple):
    """The texts of one rank or of several, with everything that travels with them."""

    features: Tensor  # [n, D]
    ids: Tensor | None  # [n] int64
    weights: Tensor | None  # [n]
    masses: Tensor | None = None  # [n]
    teachers: tuple[Tensor, ...] = ()  # [n, D'] each: the texts' features by the teachers

    def tensors(self) -> list[Tensor]:
        return [t for t in (*self[:-1], *self.teachers) if t is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> TextShard:
        ids, weights, masses = (None if t is None else function(t) for t in self[1:4])
        return TextShard(function(self.features), ids, weights, masses, tuple(map(function, self.teachers)))

    def rows(self, begin: int, end: int) -> TextShard:
        return self.map(lambda t: t[begin:end])


class RingAxis(NamedTuple):
    """One dimension of the mesh of ranks, as one rank sees it."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None  # None: this rank alone

    def shift(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Work]:
        """Start to send to the next rank and to receive from the previous one. Empty tensors are not sent."""
        if self.size == 1:
            return []
        following, previous = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [dist.P2POp(dist.isend, t, group=self.group, group_peer=following) for t in sent if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=previous) for t in received if t.numel()]
        return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class RingTopology:
    """All ranks, as one rank sees them. Its global rank is ``outer.rank · inner.size + inner.rank``."""

    outer: RingAxis  # across nodes
    inner: RingAxis  # within the node, or all ranks
    sizes: list[int]  # texts of each rank
    needs_text_grad: list[bool]  # of each rank: whether this exchange forms its text gradients
    grad_dtype: torch.dtype  # of text gradients between ranks
    grad_scale: Tensor  # [] turns this rank's contribution into a gradient

    @property
    def rank(self) -> int:
        return self.outer.rank * self.inner.size + self.inner.rank

    @property
    def world_size(self) -> int:
        return self.outer.size * self.inner.size

    def grad_rows(self, owner: int) -> int:
        """Rows of the text gradients of rank ``owner``; 0 if they are not formed."""
        return self.sizes[owner] if self.needs_text_grad[owner] else 0

    def owner(self, o: int, i: int) -> int:
        """The rank that owns the texts of step ``i`` on the node that is ``o`` nodes back."""
        node, place = self.outer.rank - o, self.inner.rank - i - (o > 0)
        return node % self.outer.size * self.inner.size + place % self.inner.size


def pairs_with(pairs: PairSpec, texts: TextShard, is_own: bool) -> PairSpec:
    """The pairs of the rank's images and ``texts``. Only its own texts have a diagonal."""
    return pairs._replace(
        positive_offset=pairs.positive_offset if is_own else None,
        text_ids=texts.ids,
        text_weights=texts.weights,
        text_masses=texts.masses,
        teachers=tuple(
            teacher._replace(text_features=features)
            for teacher, features in zip(pairs.teachers, texts.teachers, strict=True)
        ),
    )


def ring(topology: RingTopology, loop: BlockLoop, pairs: PairSpec, own: TextShard) -> Tensor:
    """The text gradients dy [n, D]; empty if not needed."""
    M, own_pairs = len(loop.x), pairs_with(pairs, own, True)
    text_ring, grad_ring = TextRing(topology, own), GradRing(topology, loop)
    dy = loop.new_rows(topology.grad_rows(topology.rank))
    own_dy = dy if topology.needs_text_grad[topology.rank] else None
    splits = any(topology.needs_text_grad) and M >= MIN_IMAGES_TO_SPLIT and topology.world_size > 1
    first = M // 2 if splits else M

    for o in range(topology.outer.size):
        for i in range(topology.inner.size):
            texts = text_ring.recv_next(o, i)
            if o == i == 0:
                loop.add(own.features, own_pairs, own_dy, rows=slice(0, first))
                continue
            contribution = grad_ring.contribution(o, i)
            loop.add(texts.features, pairs_with(pairs, texts, False), contribution)
            grad_ring.accumulate_and_send(o, i)
    if first < M:
        loop.add(own.features, own_pairs, own_dy, rows=slice(first, M), accumulate_dy=True)
    return grad_ring.finalize(dy)


class TextRing:
    """Receives the texts of one rank after another, and sends them on."""

    def __init__(self, topology: RingTopology, own: TextShard) -> None:
        self.topology, self.texts = topology, own
        # Double buffers: one is sent while the other receives.
        self.inner_buffers, self.outer_buffers = (
            [own.map(lambda t: t.new_empty((max(topology.sizes), *t.shape[1:]))) for _ in range(count)]
            for count in (2 * (topology.inner.size > 1), 2 * (topology.outer.size > 1))
        )
        self.inner_works: list[Work] = []
        self.outer_works: list[Work] = []

    def recv_next(self, o: int, i: int) -> TextShard:
        """The texts to work on now. The transfer of the next ones has started."""
        topology, N, G = self.topology, self.topology.outer.size, self.topology.inner.size
        if i:
            wait(self.inner_works)
            self.texts = self._shard(self.inner_buffers[i % 2], o, i)
        elif o:
            wait(self.outer_works)
            self.texts = self._shard(self.outer_buffers[o % 2], o, i)
        if i + 1 < G:
            received = self._shard(self.inner_buffers[(i + 1) % 2], o, i + 1)
            self.inner_works = topology.inner.shift(self.texts.tensors(), received.tensors())
        if o + 1 < N and i == (min(1, G - 1) if o == 0 else 0):
            sent = self.texts
            if o == 0:  # from a separate buffer: the inner one soon receives other texts
                sent = self._shard(self.outer_buffers[0], o, i)
                for to, t in zip(sent.tensors(), self.texts.tensors(), strict=True):
                    to.copy_(t)
            received = self._shard(self.outer_buffers[(o + 1) % 2], o + 1, 0)
            self.outer_works = topology.outer.shift(sent.tensors(), received.tensors())
        return self.texts

    def _shard(self, buffer: TextShard, o: int, i: int) -> TextShard:
        return buffer.rows(0, self.topology.sizes[self.topology.owner(o, i)])


class GradRing:
    """Adds this rank's contribution to the sums of text gradients that pass, and sends them on."""

    def __init__(self, topology: RingTopology, loop: BlockLoop) -> None:
        self.topology = topology
        N, G = topology.outer.size, topology.inner.size
        rows = max(map(topology.grad_rows, range(topology.world_size)))
        self.local = loop.new_rows(rows)
        self.inner_buffers, self.outer_buffers = (
            [loop.new_rows(rows, topology.grad_dtype) for _ in range(count)] for count in (2, 2 * (N > 1))
        )
        # Receives the sum of the own node, long before the sums of the other nodes.
        self.own_node = self.inner_buffers[G % 2] if N == 1 else torch.empty_like(self.inner_buffers[0])
        self.inner_works: list[Work] = []
        self.outer_works: list[Work] = []

    def contribution(self, o: int, i: int) -> Tensor | None:
        """[n, D] buffer for this rank's contribution; None if it is not needed."""
        owner = self.topology.owner(o, i)
        return self.local[: self.topology.sizes[owner]] if self.topology.needs_text_grad[owner] else None

    def accumulate_and_send(self, o: int, i: int) -> None:
        """Add the contribution to the sum of the previous ranks, and send the sum on."""
        topology, G = self.topology, self.topology.inner.size
        contribution = self._rows(self.local, o, i)
        total = self._rows(self.inner_buffers[i % 2], o, i)
        wait(self.inner_works)
        if i == (0 if o else 1):
            torch.mul(contribution, topology.grad_scale, out=total)
        else:
            total.addcmul_(contribution, topology.grad_scale)
        self.inner_works = []
        if i + 1 < G:
            received = self._rows(self.inner_buffers[(i + 1) % 2], o, i + 1)
            self.inner_works = topology.inner.shift([total], [received])
        elif o == 0:
            self.inner_works = topology.inner.shift([total], [self._rows(self.own_node, 0, 0)])
        else:
            wait(self.outer_works)
            sent = self._rows(self.outer_buffers[o % 2], o, i)
            sent.copy_(total) if o == 1 else sent.add_(total)
            received = self._rows(self.outer_buffers[(o + 1) % 2], o + 1, i)
            self.outer_works = topology.outer.shift([sent], [received])

    def finalize(self, dy: Tensor) -> Tensor:
        """Normalise dy, and add the contributions of the other ranks."""
        N, G = self.topology.outer.size, self.topology.inner.size
        wait(self.inner_works)
        wait(self.outer_works)
        dy.mul_(self.topology.grad_scale)
        if G > 1:
            dy.add_(self.own_node[: len(dy)])
        if N > 1:
            dy.add_(self.outer_buffers[N % 2][: len(dy)])
        return dy

    def _rows(self, t: Tensor, o: int, i: int) -> Tensor:
        return t[: self.topology.grad_rows(self.topology.owner(o, i))]


def wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()
