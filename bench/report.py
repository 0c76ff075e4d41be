"""Rows of measurements as a table, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import siglip_kernels
from bench.problems import FULL


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
        "date": datetime.date.today().isoformat(),
    }


def markdown(rows: Sequence[Row], about: dict[str, str]) -> str:
    """A table for each problem; the same text serves the terminal."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if value), ""]
    for title in dict.fromkeys(_title(row) for row in rows):
        shown = [row for row in rows if _title(row) == title]
        keys = [key for key in COLUMNS if any(_cell(row, key) for row in shown)]
        cells = [[COLUMNS[key] for key in keys], *([_cell(row, key) for key in keys] for row in shown)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
        table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        lines += [f"### {title}", "", table[0], rule, *table[1:], ""]
    return "\n".join(lines)


def write(rows: Sequence[Row], about: dict[str, str], folder: Path) -> list[Path]:
    """results.csv and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.csv", folder / "results.md"]
    with paths[0].open("w", newline="") as file:
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(file, [*names, *about])
        writer.writeheader()
        writer.writerows({**asdict(row), **about} for row in rows)
    paths[1].write_text(markdown(rows, about))
    return paths


def plot(rows: Sequence[Row], about: dict[str, str], path: Path) -> list[Path]:
    """Time and memory against batch, of the largest D, for each dtype; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return []
    full = [row for row in rows if row.mode == FULL and row.ms is not None]
    D = max((row.D for row in full), default=0)
    full = [row for row in full if row.D == D]
    dtypes = list(dict.fromkeys(row.dtype for row in full)) or [""]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.contender for row in full))}
    figure, grid = plt.subplots(len(dtypes), 2, figsize=(11, 1 + 3.6 * len(dtypes)), squeeze=False)
    for axes, dtype in zip(grid, dtypes, strict=True):
        shown = [row for row in full if row.dtype == dtype]
        _panel(axes[0], shown, "ms", f"time, ms ({dtype}, D = {D})", colours)
        _panel(axes[1], shown, "peak_mib", f"peak MiB above inputs and gradients ({dtype}, D = {D})", colours)
    # The floor has a time only: the left panel names every line.
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(colours) or 1)
    versions = f"torch {about['torch']}, commit {about['commit'] or 'unknown'}, {about['date']}"
    figure.suptitle(f"forward + backward, {about['device']}, {about['threads']} threads, {versions}", fontsize=9)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]


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


def _title(row: Row) -> str:
    return f"{row.mode}, {row.dtype}, B = {row.B:,}, D = {row.D}"


def _cell(row: Row, key: str) -> str:
    value = getattr(row, key)
    if value is None:
        return ""
    if key == "ms":
        return f"{value:.1f} [{row.ms_low:.1f}-{row.ms_high:.1f}]"
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


def _output(*command: str) -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
