"""A progress bar."""

from __future__ import annotations

import sys
import time


class Progress:
    """A bar on the last line of a terminal; elsewhere one line for each finished item."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.perf_counter()

    def show(self, label: str) -> None:
        if sys.stderr.isatty():
            filled = 24 * self.done // max(1, self.total)
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {self.seconds:4.0f} s  {label}"
            print(f"\r\033[K{line[:118]}", end="", file=sys.stderr, flush=True)

    def advance(self, label: str) -> None:
        self.done += 1
        if sys.stderr.isatty():
            self.show(label)
            if self.done == self.total:
                print(file=sys.stderr)
        else:
            eta = self.seconds / self.done * (self.total - self.done)
            print(
                f"{self.done}/{self.total} {label}, {self.seconds:.0f} s, ETA {eta:.0f} s", file=sys.stderr, flush=True
            )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start
