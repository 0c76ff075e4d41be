"""Time and memory against batch, a line for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.figures import pyplot
from bench.microbenchmark.problems import FULL
from bench.microbenchmark.results import Results, Row


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
