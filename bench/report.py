"""What was measured, as JSON, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import datetime
import functools
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

import siglip_kernels
from bench.ceilings import Bound, Rate
from bench.problems import FULL, Problem


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
    tflops: float | None = None  # by the operations of the mode's products: 6·B²·D with every gradient
    floor_ratio: float | None = None  # the floor's time / this time
    times_ours: float | None = None  # this time / ours, round by round
    of_full: float | None = None  # this time / the same backend's with every gradient, round by round
    peak_mib: float | None = None  # above inputs and gradients
    loss_error: float | None = None  # relative, against float64
    dx_error: float | None = None  # relative L2 over a sample of rows
    dy_error: float | None = None
    note: str = ""

    @classmethod
    def blank(cls, problem: Problem, contender: str, note: str) -> Row:
        """Of a contender that could not run."""
        return cls(*problem.key, contender, note=note)


@dataclass(frozen=True)
class Trial:
    """One candidate of ``bench sweep`` on one problem; None: not measured, or not to be had."""

    use: str  # which pairs
    D: int
    candidate: str
    tile: str  # rows × columns × features, warps, stages
    block: str  # images × texts
    registers: int | None = None  # a thread; of its kernels for this problem the most, as are the next
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

    about: dict[str, str]  # what the figures depend on
    checks: list[dict[str, Any]] = field(default_factory=list)  # by check, backend and dtype: what is wrong
    rates: list[Rate] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)  # of a sweep: what to ship
    left_out: list[str] = field(default_factory=list)  # what was not timed, and why
    seconds: dict[str, float] = field(default_factory=dict)  # by step


COLUMNS = {
    "contender": "contender",
    "ms": "ms [low-high]",
    "tflops": "TFLOP/s",
    "floor_ratio": "floor ratio",
    "times_ours": "× our time",
    "of_full": "of full",
    "peak_mib": "peak MiB",
    "loss_error": "loss error",
    "dx_error": "dx error",
    "dy_error": "dy error",
    "note": "",
}
FORMATS = dict.fromkeys(("floor_ratio", "times_ours", "of_full"), "{:.2f}") | {
    "tflops": "{:.3f}",
    "peak_mib": "{:,.0f}",
}


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on: device, driver, versions, commit, threads, date."""
    return {
        "device": _device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "threads": str(torch.get_num_threads()),
        "siglip_kernels": siglip_kernels.__version__,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "import": _import_time(),
        "date": datetime.date.today().isoformat(),
    }


def markdown(results: Results) -> str:
    """Everything; the same text serves the terminal."""
    lines = [", ".join(f"{key} {value}" for key, value in results.about.items() if value), ""]
    if results.conclusions:
        lines += ["### What to ship", "", *(f"- {line}" for line in results.conclusions), ""]
    if results.trials:
        lines += ["### Candidates", "", records(results.trials), ""]
    if results.checks:
        wrong = [f"- {c['backend']} {c['dtype']} {c['check']}: {line}" for c in results.checks for line in c["wrong"]]
        lines += ["### Checks", "", f"{len(results.checks)} run, {len(wrong)} failures", *wrong, ""]
    if results.rates:
        lines += ["### Ceilings and parts (TFLOP/s; copy: TB/s)", "", records(results.rates), ""]
    if results.bounds:
        lines += ["### Workspace", "", records(results.bounds), ""]
    for title in dict.fromkeys(_title(row) for row in results.rows):
        lines += [f"### {title}", "", table([row for row in results.rows if _title(row) == title]), ""]
    return "\n".join(lines + [f"- {line}" for line in results.left_out])


def table(rows: Sequence[Row]) -> str:
    """The rows of one problem, without the columns that none of them fills."""
    keys = [key for key in COLUMNS if any(_cell(row, key) for row in rows)]
    return grid([COLUMNS[key] for key in keys], [[_cell(row, key) for key in keys] for row in rows])


def records(items: Sequence[Rate] | Sequence[Bound] | Sequence[Trial]) -> str:
    """Dataclass instances of one kind, by their fields."""
    values = [asdict(item) for item in items]
    return grid(list(values[0]), [[_plain(v) for v in value.values()] for value in values])


def grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in (head, *cells)]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write(results: Results, folder: Path) -> list[Path]:
    """results.json, results.csv and results.md; candidates.csv where there are some."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"results.{kind}" for kind in ("json", "csv", "md")]
    paths[0].write_text(json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n")
    _write_csv(paths[1], Row, results.rows, results.about)
    paths[2].write_text(markdown(results))
    if results.trials:
        paths.append(folder / "candidates.csv")
        _write_csv(paths[-1], Trial, results.trials, results.about)
    return paths


def read(folder: Path) -> Results:
    """What :func:`write` wrote."""
    saved = json.loads((folder / "results.json").read_text())
    kinds: dict[str, Any] = {"rates": Rate, "bounds": Bound, "rows": Row, "trials": Trial}
    return Results(**saved | {name: [kind(**item) for item in saved.get(name, [])] for name, kind in kinds.items()})


def plot(results: Results, folder: Path) -> list[Path]:
    """results.png: time and memory against batch, for each dtype and D of several; nothing without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    about, path = results.about, folder / "results.png"
    families: dict[tuple[str, int], list[Row]] = {}
    for row in results.rows:
        if row.mode == FULL and row.ms is not None:
            families.setdefault((row.dtype, row.D), []).append(row)
    families = {key: rows for key, rows in families.items() if len({row.B for row in rows}) > 1}
    names = dict.fromkeys(row.contender for rows in families.values() for row in rows)
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    height = 1 + 3.6 * max(1, len(families))
    figure, panels = plt.subplots(max(1, len(families)), 2, figsize=(11, height), squeeze=False)
    for axes, ((dtype, D), rows) in zip(panels, families.items(), strict=False):
        _panel(axes[0], rows, "ms", f"time, ms ({dtype}, D = {D})", colours)
        _panel(axes[1], rows, "peak_mib", f"peak MiB above inputs and gradients ({dtype}, D = {D})", colours)
    # The floor has a time only: the left panel names every line.
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=min(6, len(colours)) or 1)
    versions = f"torch {about['torch']}, commit {about['commit'] or 'unknown'}, {about['date']}"
    figure.suptitle(f"forward + backward, {about['device']}, {about['threads']} threads, {versions}", fontsize=9)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]


def pyplot() -> Any:
    """For pictures in files; None without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return None
    return plt


def _panel(axis: Any, rows: Sequence[Row], key: str, title: str, colours: dict[str, str]) -> None:
    """A line for each contender: the field ``key`` against the batch. Same colours in every panel."""
    for name, colour in colours.items():
        points = [(row.B, getattr(row, key)) for row in rows if row.contender == name and getattr(row, key) is not None]
        if points:
            width = 2.8 if name.startswith("ours") else 1.2
            axis.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", linewidth=width)
    batches = sorted({row.B for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="batch")
    axis.set_title(title, fontsize=10)
    axis.set_xticks(batches, [str(B) for B in batches])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _write_csv(path: Path, kind: type, items: Sequence[Any], about: dict[str, str]) -> None:
    """A line for each of ``items`` of dataclass ``kind``, with what its figures depend on."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(kind)), *about])
        writer.writeheader()
        writer.writerows({**asdict(item), **about} for item in items)


def _plain(value: Any) -> str:
    return "n/a" if value is None else f"{value:,.3f}" if isinstance(value, float) else str(value)


def _title(row: Row) -> str:
    return f"{row.mode}, {row.dtype}, B = {row.B:,}, D = {row.D}"


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return ""
    if key == "ms":
        places = 1 if value >= 10 else 2
        return f"{value:.{places}f} [{row.ms_low:.{places}f}-{row.ms_high:.{places}f}]"
    if isinstance(value, str):
        return value
    return FORMATS.get(key, "{:.1e}").format(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    name = model[0].split(":")[1].strip() if model else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@functools.cache
def _import_time() -> str:
    """What importing siglip_kernels adds to torch's own import."""
    program = "import time, torch; s = time.perf_counter(); import siglip_kernels; print(time.perf_counter() - s)"
    seconds = _output(sys.executable, "-c", program)
    return seconds and f"{1000 * float(seconds):.0f} ms"


def _output(*command: str) -> str:
    try:
        here = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
