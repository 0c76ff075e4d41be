"""The records of one run. Their fields are the columns and keys of the files that are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.microbenchmark.problems import Problem


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Times in ms, memory in MiB; None: not measured or not applicable."""

    mode: str
    dtype: str
    B: int
    D: int
    contender: str
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    rounds: int | None = None
    tflops: float | None = None  # counts the GEMMs of the mode: 6·B²·D with every gradient
    floor_ratio: float | None = None  # the floor's time / this time
    times_ours: float | None = None  # this time / ours, round by round
    of_full: float | None = None  # this time / that of the same backend with every gradient, round by round
    peak_mib: float | None = None  # above inputs and gradients
    loss_error: float | None = None  # relative, against float64
    dx_error: float | None = None  # relative L2 over a sample of rows
    dy_error: float | None = None
    note: str = ""

    @classmethod
    def not_measured(cls, problem: Problem, contender: str, note: str) -> Row:
        """The row of a contender that could not run."""
        return cls(*problem.key, contender, note=note)


@dataclass(frozen=True)
class Rate:
    """One measured GEMM, kernel or copy. ``rate``: TFLOP/s of 2·R·C·D operations; for the copy TB/s."""

    name: str
    shape: str
    ms: float
    ms_low: float
    ms_high: float
    rate: float


@dataclass(frozen=True)
class WorkspaceBound:
    """Time and peak memory of the whole loss under one limit of the workspace for dz."""

    dz_mib: float
    ms: float
    ms_low: float
    ms_high: float
    peak_mib: float | None


@dataclass(frozen=True)
class Trial:
    """One candidate of ``bench sweep`` on one problem; None: not measured or not available."""

    use: str  # which pairs
    D: int
    candidate: str
    tile: str  # rows × columns × features, warps, stages
    block: str  # images × texts
    registers: int | None = None  # a thread; the most among its kernels for this problem, as in the next two
    spills: int | None = None
    shared_kib: float | None = None
    block_ms: float | None = None  # the block kernel alone
    block_tflops: float | None = None
    ms: float | None = None  # the whole loss, forward and backward
    floor_ratio: float | None = None
    of_shipped: float | None = None  # this time / the shipped configuration's, round by round
    peak_mib: float | None = None
    note: str = ""  # why it is not timed


@dataclass
class Results:
    """One run of the benchmark."""

    about: dict[str, str]  # the environment: device, versions, commit, date
    checks: list[dict[str, Any]] = field(default_factory=list)  # check, backend, dtype, and a list of what is wrong
    rates: list[Rate] = field(default_factory=list)
    bounds: list[WorkspaceBound] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)  # what a sweep recommends to ship
    left_out: list[str] = field(default_factory=list)  # what was not timed, and why
    seconds: dict[str, float] = field(default_factory=dict)  # by step
