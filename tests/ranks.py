"""Processes that stand for the ranks of a world: started once, and given one function after another."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu import checks

TIMEOUT = 120.0  # seconds; of the group, and of a function, which may compile


class Ranks:
    """A world of ``size`` processes over gloo; every smaller group of its first ranks is there too.

    They start when they are first given a function, and anew after one that a rank did not return from.
    """

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        self.size, self.timeout = size, timeout
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def start(self) -> None:
        # Torch is imported once, by a server that forks the ranks: this process has threads, and cannot be forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "torch._dynamo", __name__])
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = rank, self.size, str(Path(self.folder.name) / "store"), self.timeout, theirs
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def try_run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(rank, group, *arguments)`` on the first ``size`` ranks: what each returned, or its exception."""
        if not self.processes:
            self.start()
        connections = self.connections[:size]
        for connection in connections:
            connection.send((size, function, arguments))
        results = []
        for rank, connection in enumerate(connections):
            if not connection.poll(self.timeout + 30):
                self.close()
                raise TimeoutError(f"rank {rank} of {size} did not return from {function.__name__}{arguments}")
            try:
                results.append(connection.recv())
            except (EOFError, ConnectionError):
                results.append(ProcessLookupError(f"rank {rank} is gone"))
        if any(isinstance(result, ProcessLookupError) for result in results):
            self.close()
        return results

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As ``try_run``; raises what any rank raised."""
        results = self.try_run(size, function, *arguments)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.connections, self.processes = [], []


def _work(rank: int, size: int, store: str, timeout: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    groups = {n: dist.new_group(range(n), timeout=limit) for n in range(1, size)}
    groups[size] = dist.group.WORLD
    kept = set(dist.distributed_c10d._world.pg_map)
    while True:
        n, function, arguments = connection.recv()
        # Every rank has returned from the last function. A gloo group's thread wakes a hundred times a second.
        for group in set(dist.distributed_c10d._world.pg_map) - kept:
            dist.destroy_process_group(group)
        try:
            with checks.poisoned_memory(warn_only=False):
                result = function(rank, groups[n], *arguments)
            connection.send(result)
        except Exception as error:
            error.add_note(f"on rank {rank} of {n}:\n{traceback.format_exc()}")
            connection.send(error)


def slices(sizes: Sequence[int]) -> list[slice]:
    """Where each rank's part lies in the joined batch."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - n, end) for end, n in zip(ends, sizes, strict=True)]
