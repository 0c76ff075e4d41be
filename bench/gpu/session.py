"""One run of a command on a GPU: step by step, the results written after each, whatever fails."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness.devices import add_device_argument, device_from
from bench.harness.environment import environment
from bench.harness.timing import free_cached_memory
from bench.microbenchmark import report
from bench.microbenchmark.problems import Problem
from bench.microbenchmark.results import Results

SECONDS_PER_PROBLEM = {"cuda": 1.5, "cpu": 0.2}  # of timing


@dataclass
class Session:
    """What was requested, the results so far, and the failures."""

    device: torch.device
    folder: Path
    selected: list[str] | None  # contenders, by name
    deadline: float  # by time.perf_counter
    results: Results
    failures: list[str] = field(default_factory=list)
    # By (backend, dtype) that failed a check: the first reason.
    rejected: dict[tuple[str, torch.dtype], str] = field(default_factory=dict)
    late_compilations: list[str] = field(default_factory=list)  # kernels that were not compiled ahead

    @property
    def seconds(self) -> float:
        return SECONDS_PER_PROBLEM[self.device.type]

    def run_step(self, title: str, run: Callable[[], None]) -> None:
        """Run one step, write the results, and continue after an exception."""
        print(f"\n## {title}", flush=True)
        started = time.perf_counter()
        try:
            run()
        except Exception as error:
            self.failures.append(f"{title}: {type(error).__name__}: {error}")
            traceback.print_exc()
        free_cached_memory(self.device)
        self.results.seconds[title] = round(time.perf_counter() - started, 1)
        report.write(self.results, self.folder)

    def reject(self, backend: str, dtype: torch.dtype, reasons: list[str]) -> None:
        """Exclude the backend in ``dtype`` from timing; the first reason is kept."""
        self.failures += reasons
        if (backend, dtype) not in self.rejected:
            self.rejected[backend, dtype] = reasons[0]
            self.results.left_out.append(f"ours ({backend}) in {str(dtype)[6:]} is not timed: {reasons[0]}")

    def excluded(self, problem: Problem) -> list[str]:
        """The contenders that are excluded from timing on ``problem``."""
        backends = [backend for backend, dtype in self.rejected if dtype is problem.dtype]
        return [name for backend in backends for name in (f"ours ({backend})", f"ours ({backend}), graph")]

    def finish(self) -> int:
        """Print the summary; the exit status."""
        print("\n".join(["", *self.results.left_out, *(f"FAILED {line}" for line in self.failures)]))
        print(
            f"kernels compiled at their first launch after all: {len(self.late_compilations)}",
            *self.late_compilations,
            sep="\n  ",
        )
        print(f"written: {self.folder}; seconds by step: {self.results.seconds}")
        return int(bool(self.failures))


def add_session_arguments(parser: argparse.ArgumentParser, minutes: float) -> None:
    add_device_argument(parser, "cpu: tiny sizes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=minutes, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")


def start(parser: argparse.ArgumentParser, options: argparse.Namespace, selected: list[str] | None = None) -> Session:
    """A session from the arguments that :func:`add_session_arguments` added."""
    device = device_from(parser, options)
    deadline = time.perf_counter() + 60 * options.minutes
    return Session(device, options.out, selected, deadline, Results(environment(device)))
