"""Rows of measurements as a table, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import siglip_kernels


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
    tflops: float | None = None  # by the operations of the mode's products: 6·B²·D with every gradient
    floor_ratio: float | None = None  # the floor's time / this time
    times_ours: float | None = None  # this time / ours, round by round
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
    "peak_mib": "peak MiB",
    "loss_error": "loss error",
    "dx_error": "dx error",
    "dy_error": "dy error",
    "note": "",
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
        cells = [
            list(COLUMNS.values()),
            *([_cell(row, key) for key in COLUMNS] for row in rows if _title(row) == title),
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
        table = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        lines += [f"### {title}", "", table[0], rule, *table[1:], ""]
    return "\n".join(lines)


def write(rows: Sequence[Row], about: dict[str, str], folder: Path) -> list[Path]:
    """results.csv, results.md and, with matplotlib, results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.csv", folder / "results.md"]
    with paths[0].open("w", newline="") as file:
        names = [field.name for field in fields(Row)]
        writer = csv.DictWriter(file, [*names, *about])
        writer.writeheader()
        writer.writerows({**asdict(row), **about} for row in rows)
    paths[1].write_text(markdown(rows, about))
    return [*paths, *plot(rows, about, folder / "results.png")]


def plot(rows: Sequence[Row], about: dict[str, str], path: Path) -> list[Path]:
    """Time and memory against batch, of the largest D, for each dtype; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is not installed: no plot")
        return []
    full = [row for row in rows if row.mode == "forward + backward" and row.ms is not None]
    D = max((row.D for row in full), default=0)
    dtypes = list(dict.fromkeys(row.dtype for row in full if row.D == D))
    figure, grid = plt.subplots(max(1, len(dtypes)), 2, figsize=(11, 4 * max(1, len(dtypes))), squeeze=False)
    for axes, dtype in zip(grid, dtypes, strict=False):
        shown = [row for row in full if (row.dtype, row.D) == (dtype, D)]
        for name in dict.fromkeys(row.contender for row in shown):
            line = [row for row in shown if row.contender == name]
            style = {"label": name, "marker": "o", "linewidth": 2.5 if name.startswith("ours") else 1.2}
            axes[0].plot([r.B for r in line], [r.ms for r in line], **style)
            measured = [r for r in line if r.peak_mib is not None]
            if measured:
                axes[1].plot([r.B for r in measured], [r.peak_mib for r in measured], **style)
        for axis, what in zip(axes, ("time, ms", "peak memory above inputs and gradients, MiB"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel="batch", title=f"{what} ({dtype}, D = {D})")
            axis.set_xticks([r.B for r in shown], [str(r.B) for r in shown], minor=False)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend()
    caption = (
        f"forward + backward, {about['device']}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    )
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]


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
    return {"tflops": "{:.3f}", "floor_ratio": "{:.2f}", "times_ours": "{:.2f}", "peak_mib": "{:,.0f}"}.get(
        key, "{:.1e}"
    ).format(value)


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
