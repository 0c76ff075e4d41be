"""The ring: texts travel from rank to rank, and the sum of their gradients behind them.

Of N nodes with G ranks each, rank (n, g) works on the texts of (n, g), (n, g - 1), …, all of its own node; then, o
nodes further back for o = 1, 2, …, on those of (n - o, g - 1), (n - o, g - 2), …, (n - o, g - G). Texts are sent on
before they are worked on: round the node and, the first of every node, to the next node too, which may take as long as
the whole way round. Every rank has its own link between nodes, and uses it.

The sum of their gradients begins on the rank after their own, or on the first of another node, and gains the part of
every rank on the way round that node; from the second node on, those of the nodes before too. Both come home last. That
is N·G - 1 transfers of texts and as many of sums, whatever N; a group without nodes is one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import BlockLoop

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

# Images from which on a rank cuts its own block in two, to compute beside the first transfer and beside the last. By
# the model of bench/scaling/model.py the launches of one more block take longer than what they hide below.
ENOUGH_TO_SPLIT = 2048


class Texts(NamedTuple):
    """What travels of one rank's texts, or of several ranks'."""

    features: Tensor  # [n, D]
    ids: Tensor | None  # [n] int64
    weights: Tensor | None  # [n]
    masses: Tensor | None = None  # [n]

    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def each(self, function: Callable[[Tensor], Tensor]) -> Texts:
        return Texts(function(self.features), *(None if t is None else function(t) for t in self[1:]))

    def rows(self, begin: int, end: int) -> Texts:
        return self.each(lambda t: t[begin:end])


class Lane(NamedTuple):
    """A ring of ranks, as one of them sees it."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None  # None: this rank alone

    def shift(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Work]:
        """Begin to send to the next rank and to receive from the one before; empty tensors stay at home."""
        if self.size == 1:
            return []
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        operations = [dist.P2POp(dist.isend, t, group=self.group, group_peer=after) for t in sent if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, group=self.group, group_peer=before) for t in received if t.numel()]
        return dist.batch_isend_irecv(operations) if operations else []


@dataclass(frozen=True)
class World:
    """All ranks, as one of them sees them; ``outer.rank · inner.size + inner.rank`` is its number among them."""

    outer: Lane  # across nodes
    inner: Lane  # within the node, or all ranks
    sizes: list[int]  # texts of each rank
    gives: list[bool]  # whether the text gradients of each rank are to be formed
    travelling: torch.dtype  # of text gradients between ranks
    gain: Tensor  # [] what turns this rank's contribution into a gradient

    @property
    def rank(self) -> int:
        return self.outer.rank * self.inner.size + self.inner.rank

    def sums(self, owner: int) -> int:
        """Rows of the text gradients of a rank: 0 where they are not to be formed."""
        return self.sizes[owner] if self.gives[owner] else 0

    def owner(self, o: int, i: int) -> int:
        """Whose texts this rank works on at place ``i`` of the node that is ``o`` nodes back."""
        node, place = self.outer.rank - o, self.inner.rank - i - (o > 0)
        return node % self.outer.size * self.inner.size + place % self.inner.size


def against(pairs: PairSpec, texts: Texts, own: bool) -> PairSpec:
    """The rank's images against ``texts``; only its own texts have a diagonal."""
    offset = pairs.positive_offset if own else None
    ids, weights, masses = texts[1:]
    return replace(pairs, positive_offset=offset, text_ids=ids, text_weights=weights, text_masses=masses)


def ring(world: World, loop: BlockLoop, pairs: PairSpec, own: Texts) -> Tensor:
    """dy [n, D], empty if not wanted."""
    M, own_pairs = len(loop.x), against(pairs, own, True)
    texts_ring, sums_ring = TextsRing(world, own), SumsRing(world, loop)
    dy = loop.empty(world.sums(world.rank))
    mine = dy if world.gives[world.rank] else None
    alone = world.outer.size * world.inner.size == 1
    first = M // 2 if any(world.gives) and M >= ENOUGH_TO_SPLIT and not alone else M

    for o in range(world.outer.size):
        for i in range(world.inner.size):
            texts = texts_ring.arrive(o, i)
            if o == i == 0:
                loop.add(own.features, own_pairs, mine, rows=slice(0, first))
                continue
            contribution = sums_ring.room(o, i)
            loop.add(texts.features, against(pairs, texts, False), contribution)
            sums_ring.send(o, i)
    if first < M:
        loop.add(own.features, own_pairs, mine, rows=slice(first, M), dy_begun=True)
    return sums_ring.come_home(dy)


class TextsRing:
    """Brings the texts of one rank after another, and sends them on."""

    def __init__(self, world: World, own: Texts) -> None:
        self.world, self.texts = world, own
        # Of each two, one is sent from while the other is received into.
        self.inner_boxes, self.outer_boxes = (
            [own.each(lambda t: t.new_empty((max(world.sizes), *t.shape[1:]))) for _ in range(boxes)]
            for boxes in (2 * (world.inner.size > 1), 2 * (world.outer.size > 1))
        )
        self.inner_moving: list[Work] = []
        self.outer_moving: list[Work] = []

    def arrive(self, o: int, i: int) -> Texts:
        """The texts to work on now; the next are on their way."""
        world, N, G = self.world, self.world.outer.size, self.world.inner.size
        if i:
            wait(self.inner_moving)
            self.texts = self._room(self.inner_boxes[i % 2], o, i)
        elif o:
            wait(self.outer_moving)
            self.texts = self._room(self.outer_boxes[o % 2], o, i)
        if i + 1 < G:
            room = self._room(self.inner_boxes[(i + 1) % 2], o, i + 1)
            self.inner_moving = world.inner.shift(self.texts.tensors(), room.tensors())
        if o + 1 < N and i == (min(1, G - 1) if o == 0 else 0):
            sent = self.texts
            if o == 0:  # from a box of its own: the inner one is soon received into
                sent = self._room(self.outer_boxes[0], o, i)
                for to, t in zip(sent.tensors(), self.texts.tensors(), strict=True):
                    to.copy_(t)
            room = self._room(self.outer_boxes[(o + 1) % 2], o + 1, 0)
            self.outer_moving = world.outer.shift(sent.tensors(), room.tensors())
        return self.texts

    def _room(self, box: Texts, o: int, i: int) -> Texts:
        return box.rows(0, self.world.sizes[self.world.owner(o, i)])


class SumsRing:
    """Adds this rank's part to the sums of text gradients that come by, and sends them on."""

    def __init__(self, world: World, loop: BlockLoop) -> None:
        self.world = world
        N, G = world.outer.size, world.inner.size
        rows = max(map(world.sums, range(N * G)))
        self.part = loop.empty(rows)
        self.inner_sums, self.outer_sums = (
            [loop.empty(rows, world.travelling) for _ in range(count)] for count in (2, 2 * (N > 1))
        )
        # Where the sum of the own node arrives, long before those of the others.
        self.home = self.inner_sums[G % 2] if N == 1 else torch.empty_like(self.inner_sums[0])
        self.inner_moving: list[Work] = []
        self.outer_moving: list[Work] = []

    def room(self, o: int, i: int) -> Tensor | None:
        """[n, D] where this rank's part is to be written; None where it is not wanted."""
        owner = self.world.owner(o, i)
        return self.part[: self.world.sizes[owner]] if self.world.gives[owner] else None

    def send(self, o: int, i: int) -> None:
        """What has been written is added to what others wrote, and moves on."""
        world, G = self.world, self.world.inner.size
        part = self._rows(self.part, o, i)
        total = self._rows(self.inner_sums[i % 2], o, i)
        wait(self.inner_moving)
        if i == (0 if o else 1):
            torch.mul(part, world.gain, out=total)
        else:
            total.addcmul_(part, world.gain)
        self.inner_moving = []
        if i + 1 < G:
            self.inner_moving = world.inner.shift([total], [self._rows(self.inner_sums[(i + 1) % 2], o, i + 1)])
        elif o == 0:
            self.inner_moving = world.inner.shift([total], [self._rows(self.home, 0, 0)])
        else:
            wait(self.outer_moving)
            outgoing = self._rows(self.outer_sums[o % 2], o, i)
            outgoing.copy_(total) if o == 1 else outgoing.add_(total)
            self.outer_moving = world.outer.shift([outgoing], [self._rows(self.outer_sums[(o + 1) % 2], o + 1, i)])

    def come_home(self, dy: Tensor) -> Tensor:
        """dy, un-scaled until now, and the parts of the other ranks."""
        N, G = self.world.outer.size, self.world.inner.size
        wait(self.inner_moving)
        wait(self.outer_moving)
        dy.mul_(self.world.gain)
        if G > 1:
            dy.add_(self.home[: len(dy)])
        if N > 1:
            dy.add_(self.outer_sums[N % 2][: len(dy)])
        return dy

    def _rows(self, t: Tensor, o: int, i: int) -> Tensor:
        return t[: self.world.sums(self.world.owner(o, i))]


def wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()
