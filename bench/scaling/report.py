"""The predictions of the model as JSON, CSV, Markdown and a figure."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.harness.figures import pyplot
from bench.harness.tables import markdown_table
from bench.scaling.prediction import HIDDEN_BELOW, Prediction, smallest_hidden_batch

GLOBAL_BATCH = 2**20


# Columns of the table; the files have every field.
COLUMNS = {
    "W": ("GPUs", "{:,}"),
    "b": ("local batch", "{:,}"),
    "compute_ms": ("compute, ms", "{:,.3f}"),
    "ring_ms": ("flat ring, ms", "{:,.3f}"),
    "two_level_ms": ("two-level ring, ms", "{:,.3f}"),
    "gather_ms": ("gather, ms", "{:,.3f}"),
    "ring_exposed": ("flat exposed", "{:.1%}"),
    "two_level_exposed": ("two-level exposed", "{:.1%}"),
    "gather_exposed": ("gather exposed", "{:.1%}"),
    "ring_mib": ("flat, MiB", "{:,.0f}"),
    "two_level_mib": ("two-level, MiB", "{:,.0f}"),
    "gather_mib": ("gather, MiB", "{:,.0f}"),
}
RINGS = {"ring_exposed": "flat ring", "two_level_exposed": "two-level ring"}


def table(points: Sequence[Prediction]) -> str:
    cells = [[form.format(getattr(p, key)) for key, (_, form) in COLUMNS.items()] for p in points]
    return markdown_table([title for title, _ in COLUMNS.values()], cells)


def markdown(about: dict[str, str], points: Sequence[Prediction]) -> str:
    """The whole report; also printed to the terminal."""
    hidden = []
    for W in dict.fromkeys(p.W for p in points):
        hidden.append([f"{W:,}"])
        for exposed in RINGS:
            b = smallest_hidden_batch({p.b: getattr(p, exposed) for p in points if p.W == W})
            hidden[-1] += ["none", ""] if b is None else [f"{b:,}", f"{W * b:,}"]
    large = [p for p in points if p.W * p.b == GLOBAL_BATCH]
    splits = {
        name: ", ".join(f"{p.W:,} × {p.b:,}" for p in large if getattr(p, exposed) < HIDDEN_BELOW)
        for exposed, name in RINGS.items()
    }
    sections = [
        "# The distributed loss on a cluster: predictions of a model (bench/scaling/model.py), not measurements",
        "\n".join(f"- {key}: {value}" for key, value in about.items()),
        f"## From which local batch of these a ring hides its traffic (exposed < {HIDDEN_BELOW:.0%})",
        markdown_table(
            ("GPUs", *(f"{name}: {n} batch" for name in RINGS.values() for n in ("local", "global"))), hidden
        ),
        f"## A global batch of {GLOBAL_BATCH:,}",
        "\n".join(
            f"- The {name} hides its traffic with GPUs × local batch of: {s or 'none of these'}."
            for name, s in splits.items()
        ),
        table(large) if large else "",
        "## All",
        table(points),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write(about: dict[str, str], points: Sequence[Prediction], folder: Path) -> list[Path]:
    """scaling.json, scaling.csv and scaling.md."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scaling.{kind}" for kind in ("json", "csv", "md")]
    predicted = [asdict(p) for p in points]
    paths[0].write_text(json.dumps({"about": about, "predicted": predicted}, indent=1, ensure_ascii=False) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [*predicted[0], *about])
        writer.writeheader()
        writer.writerows(point | about for point in predicted)
    paths[2].write_text(markdown(about, points))
    return paths


def plot(about: dict[str, str], points: Sequence[Prediction], folder: Path) -> list[Path]:
    """scaling.png: the exposed share of both rings against local batch, a colour for each W, and the time for a global
    batch of GLOBAL_BATCH against W; nothing without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    worlds, large = sorted({p.W for p in points}), [p for p in points if p.W * p.b == GLOBAL_BATCH]
    figure, axes = plt.subplots(1, 2 + bool(large), figsize=(17 if large else 12, 5))
    axes[0].sharey(axes[1])
    for axis, (key, name) in zip(axes[:2], RINGS.items(), strict=True):
        for index, W in enumerate(worlds):
            shares = {p.b: 100 * getattr(p, key) for p in points if p.W == W}
            colour = plt.get_cmap("viridis")(index / max(1, len(worlds) - 1))
            axis.plot(sorted(shares), [shares[b] for b in sorted(shares)], "o-", color=colour, label=f"{W:,} GPUs")
        axis.axhline(100 * HIDDEN_BELOW, color="grey", linewidth=0.8)
        axis.set(title=f"{name}: exposed communication, % of the time", xlabel="local batch")
    if large:
        for key, style in {"gather_ms": "x--", "ring_ms": "o-", "two_level_ms": "s-", "compute_ms": "k:"}.items():
            label = COLUMNS[key][0].removesuffix(", ms")
            axes[2].plot([p.W for p in large], [getattr(p, key) for p in large], style, label=label)
        axes[2].set(title=f"global batch {GLOBAL_BATCH:,}: time, ms", xlabel="GPUs", yscale="log")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"predicted by a model; {about['rate']}\n{about['cluster']}", fontsize=8, wrap=True)
    figure.tight_layout()
    path = folder / "scaling.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return [path]
