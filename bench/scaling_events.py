"""The ring of ``scaling.py`` as events in the order of their time, with a program for each rank.

The reference for ``scaling.finish``, which is fit for large worlds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from bench.scaling import Array, Ring


@dataclass
class Transfer:
    """Over one link."""

    seconds: float
    asked: int = 0  # by how many of its two ends
    done: bool = False
    waiting: list[int] = field(default_factory=list)  # ranks


class Simulation:
    """A link is named by its sender."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.now, self.order = ring, ring.agreement, itertools.count()
        self.events: list[tuple[float, int, Callable[[int], None], int]] = []
        self.transfers: dict[tuple[str, int, int], Transfer] = {}  # by what is sent, step, link
        self.links: list[deque[Transfer]] = [deque() for _ in range(ring.W)]  # the first is on its way, or will be next
        self.busy = [False] * ring.W
        self.programs = [self.program(rank) for rank in range(ring.W)]
        self.finished = np.zeros(ring.W)

    def run(self) -> Array:
        """[W] seconds after which each rank is done."""
        for rank in range(self.ring.W):
            self._after(0.0, self._resume, rank)
        while self.events:
            self.now, _, act, where = heapq.heappop(self.events)
            act(where)
        return self.finished

    def program(self, rank: int) -> Iterator[float | Transfer]:
        """What a rank does: it yields seconds to compute, and transfers to wait for."""
        ring = self.ring
        summing: list[Transfer] = []
        first, last = (part[rank] for part in ring.own())
        moving = self.shift(rank, "features", 1) if ring.W > 1 else []
        yield first
        for step in range(1, ring.W):
            yield from moving
            if step + 1 < ring.W:
                moving = self.shift(rank, "features", step + 1)
            yield ring.blocks()[rank, step] + ring.overhead
            if ring.sums is not None:
                yield from summing
                summing = self.shift(rank, "sums", step)
        yield last
        yield from summing
        self.finished[rank] = self.now

    def shift(self, rank: int, what: str, step: int) -> list[Transfer]:
        """Ask to send to the next rank and to receive from the one before."""
        before = (rank - 1) % self.ring.W
        sent, received = (self._asked(what, step, link) for link in (rank, before))
        self.links[rank].append(sent)
        for link in (rank, before):
            self._begin_next(link)
        return [sent, received]

    def _asked(self, what: str, step: int, link: int) -> Transfer:
        hops = self.ring.features if what == "features" else self.ring.sums
        assert hops is not None
        transfer = self.transfers.setdefault((what, step, link), Transfer(hops[link]))
        transfer.asked += 1
        return transfer

    def _begin_next(self, link: int) -> None:
        queue = self.links[link]
        if queue and queue[0].asked == 2 and not self.busy[link]:
            self.busy[link] = True
            self._after(queue[0].seconds, self._arrive, link)

    def _arrive(self, link: int) -> None:
        transfer = self.links[link].popleft()
        transfer.done, self.busy[link] = True, False
        self._begin_next(link)
        for rank in transfer.waiting:
            self._resume(rank)

    def _resume(self, rank: int) -> None:
        for wanted in self.programs[rank]:
            if not isinstance(wanted, Transfer):
                return self._after(wanted, self._resume, rank)
            if not wanted.done:
                return wanted.waiting.append(rank)
        return None

    def _after(self, seconds: float, act: Callable[[int], None], where: int) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act, where))
