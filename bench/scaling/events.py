"""The ring of ``scaling.py`` as events in the order of their time, with a program for each rank.

The reference for ``scaling.finish``, which is fit for large worlds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.scaling.model import Array, Ring, after

Link = tuple[str, int]  # lane, sender


@dataclass
class Transfer:
    """Over one link."""

    seconds: float
    asked: int = 0  # by how many of its two ends
    done: bool = False
    waiting: list[int] = field(default_factory=list)  # ranks


class Simulation:
    """A link is named by its lane and its sender."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.now, self.order = ring, ring.agreement, itertools.count()
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.hops = {"inner": ring.inner._asdict(), "outer": ring.outer._asdict()}
        self.sender = dict(zip(self.hops, map(np.argsort, after(ring.N, ring.G)), strict=True))
        self.transfers: dict[tuple[str, int, Link], Transfer] = {}  # by what is sent and the step that asks for it
        self.links: defaultdict[Link, deque[Transfer]] = defaultdict(deque)  # the first is on its way, or will be next
        self.busy: set[Link] = set()
        self.programs = [self.program(rank) for rank in range(ring.ranks)]
        self.finished = np.zeros(ring.ranks)

    def run(self) -> Array:
        """[W] seconds after which each rank is done."""
        for rank in range(self.ring.ranks):
            self._after(0.0, self._resume, rank)
        while self.events:
            self.now, _, act, where = heapq.heappop(self.events)
            act(where)
        return self.finished

    def program(self, rank: int) -> Iterator[float | Transfer]:
        """What a rank does: it yields seconds to compute, and transfers to wait for."""
        ring, N, G = self.ring, self.ring.N, self.ring.G
        inner_texts: list[Transfer] = []
        outer_texts: list[Transfer] = []
        inner_sums: list[Transfer] = []
        outer_sums: list[Transfer] = []
        first, last = (part[rank] for part in ring.own())
        for step in range(ring.ranks):
            o, i = divmod(step, G)
            if step:
                yield from inner_texts if i else outer_texts
            if i + 1 < G:
                inner_texts = self.shift("inner", rank, "features", step)
            if o + 1 < N and i == (min(1, G - 1) if o == 0 else 0):
                outer_texts = self.shift("outer", rank, "features", step)
            if step == 0:
                yield first
                continue
            yield ring.blocks()[rank, step] + ring.overhead
            if ring.backward:
                yield from inner_sums
                inner_sums = []
                if i + 1 < G or o == 0:
                    inner_sums = self.shift("inner", rank, "sums", step)
                else:
                    yield from outer_sums
                    outer_sums = self.shift("outer", rank, "sums", step)
        yield last
        yield from inner_sums
        yield from outer_sums
        self.finished[rank] = self.now

    def shift(self, lane: str, rank: int, what: str, step: int) -> list[Transfer]:
        """Ask to send to the next rank and to receive from the one before."""
        links = (lane, rank), (lane, int(self.sender[lane][rank]))
        sent, received = (self._asked(what, step, link) for link in links)
        self.links[links[0]].append(sent)
        for link in links:
            self._begin_next(link)
        return [sent, received]

    def _asked(self, what: str, step: int, link: Link) -> Transfer:
        lane, sender = link
        transfer = self.transfers.setdefault((what, step, link), Transfer(self.hops[lane][what][sender]))
        transfer.asked += 1
        return transfer

    def _begin_next(self, link: Link) -> None:
        queue = self.links[link]
        if queue and queue[0].asked == 2 and link not in self.busy:
            self.busy.add(link)
            self._after(queue[0].seconds, self._arrive, link)

    def _arrive(self, link: Link) -> None:
        transfer = self.links[link].popleft()
        transfer.done = True
        self.busy.remove(link)
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

    def _after(self, seconds: float, act: Callable[[Any], None], where: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act, where))
