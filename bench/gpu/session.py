"""One run of a command on a GPU that may be gone tomorrow: step by step, written after each, whatever happens."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness.devices import add_device, device_of
from bench.harness.environment import environment
from bench.harness.timing import release
from bench.microbenchmark import report
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Results

SECONDS = {"cuda": 1.5, "cpu": 0.2}  # of timing for each problem


@dataclass
class Session:
    """What is asked for, what has been found, and what went wrong."""

    device: torch.device
    folder: Path
    names: list[str] | None  # of contenders
    ends: float  # by time.perf_counter
    results: Results
    failed: list[str] = field(default_factory=list)
    rejected: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)  # backends that a check failed: why
    late: list[str] = field(default_factory=list)  # kernels that were not compiled ahead after all

    @property
    def seconds(self) -> float:
        return SECONDS[self.device.type]

    def step(self, title: str, run: Callable[[], None]) -> None:
        """Run one step, keep what it found, and go on."""
        print(f"\n## {title}", flush=True)
        begin = time.perf_counter()
        try:
            run()
        except Exception as error:
            self.failed.append(f"{title}: {type(error).__name__}: {error}")
            traceback.print_exc()
        release(self.device)
        self.results.seconds[title] = round(time.perf_counter() - begin, 1)
        report.write(self.results, self.folder)

    def reject(self, backend: str, dtype: torch.dtype, wrong: list[str]) -> None:
        """Time the backend in ``dtype`` no more; the first reason is kept."""
        self.failed += wrong
        if (backend, dtype) not in self.rejected:
            self.rejected[backend, dtype] = wrong[0]
            self.results.left_out.append(f"ours ({backend}) in {str(dtype)[6:]} is not timed: {wrong[0]}")

    def left_out(self, problem: Problem) -> list[str]:
        """The contenders that are not to be timed on ``problem``."""
        backends = [backend for backend, dtype in self.rejected if dtype is problem.dtype]
        return [name for backend in backends for name in (f"ours ({backend})", f"ours ({backend}), graph")]

    def finish(self) -> int:
        """The exit status, and the last words."""
        print("\n".join(["", *self.results.left_out, *(f"FAILED {line}" for line in self.failed)]))
        print(f"kernels compiled at their first launch after all: {len(self.late)}", *self.late, sep="\n  ")
        print(f"written: {self.folder}; seconds by step: {self.results.seconds}")
        return int(bool(self.failed))


def add_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    add_device(parser, "cpu: tiny sizes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=minutes, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")


def begin(parser: argparse.ArgumentParser, options: argparse.Namespace, names: list[str] | None = None) -> Session:
    """Of the arguments that :func:`add_arguments` added."""
    device = device_of(parser, options)
    ends = time.perf_counter() + 60 * options.minutes
    return Session(device, options.out, names, ends, Results(environment(device)))
