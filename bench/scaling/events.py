"""The ring of ``model.py`` as a discrete-event simulation, with a program for each rank.

The reference for ``model.completion_times``, which is fast enough for thousands of ranks.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.scaling.model import Array, RingModel, next_ranks

LinkId = tuple[str, int]  # axis, sender


@dataclass
class Transfer:
    """One transfer over one link."""

    seconds: float
    posted: int = 0  # by how many of its two ends
    done: bool = False
    waiting: list[int] = field(default_factory=list)  # ranks


class Simulation:
    """Runs the programs of all ranks; a link is identified by its axis and its sender."""

    def __init__(self, ring: RingModel) -> None:
        self.ring, self.now, self.order = ring, ring.handshake, itertools.count()
        self.events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self.hops = {"inner": ring.inner._asdict(), "outer": ring.outer._asdict()}
        self.sender = dict(zip(self.hops, map(np.argsort, next_ranks(ring.N, ring.G)), strict=True))
        self.transfers: dict[tuple[str, int, LinkId], Transfer] = {}  # by content, step that posted it, and link
        self.links: defaultdict[LinkId, deque[Transfer]] = defaultdict(deque)  # the first is in transit or starts next
        self.busy: set[LinkId] = set()
        self.programs = [self.program(rank) for rank in range(ring.ranks)]
        self.finished = np.zeros(ring.ranks)

    def run(self) -> Array:
        """[W] seconds until each rank is done."""
        for rank in range(self.ring.ranks):
            self._schedule(0.0, self._resume, rank)
        while self.events:
            self.now, _, act, where = heapq.heappop(self.events)
            act(where)
        return self.finished

    def program(self, rank: int) -> Iterator[float | Transfer]:
        """What a rank does: yields seconds to compute and transfers to wait for."""
        ring, N, G = self.ring, self.ring.N, self.ring.G
        inner_texts: list[Transfer] = []
        outer_texts: list[Transfer] = []
        inner_sums: list[Transfer] = []
        outer_sums: list[Transfer] = []
        first, last = (part[rank] for part in ring.own_parts())
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
            yield ring.block_matrix()[rank, step] + ring.overhead
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

    def shift(self, axis: str, rank: int, what: str, step: int) -> list[Transfer]:
        """Post a send to the next rank and a receive from the previous one."""
        links = (axis, rank), (axis, int(self.sender[axis][rank]))
        sent, received = (self._post(what, step, link) for link in links)
        self.links[links[0]].append(sent)
        for link in links:
            self._start_next(link)
        return [sent, received]

    def _post(self, what: str, step: int, link: LinkId) -> Transfer:
        axis, sender = link
        transfer = self.transfers.setdefault((what, step, link), Transfer(self.hops[axis][what][sender]))
        transfer.posted += 1
        return transfer

    def _start_next(self, link: LinkId) -> None:
        queue = self.links[link]
        if queue and queue[0].posted == 2 and link not in self.busy:
            self.busy.add(link)
            self._schedule(queue[0].seconds, self._complete, link)

    def _complete(self, link: LinkId) -> None:
        transfer = self.links[link].popleft()
        transfer.done = True
        self.busy.remove(link)
        self._start_next(link)
        for rank in transfer.waiting:
            self._resume(rank)

    def _resume(self, rank: int) -> None:
        for request in self.programs[rank]:
            if not isinstance(request, Transfer):
                return self._schedule(request, self._resume, rank)
            if not request.done:
                return request.waiting.append(rank)
        return None

    def _schedule(self, seconds: float, act: Callable[[Any], None], where: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), act, where))
