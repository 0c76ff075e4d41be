"""The results of one run as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from bench.harness.tables import markdown_table
from bench.microbenchmark.results import Rate, Results, Row, Trial, WorkspaceBound

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


def markdown(results: Results) -> str:
    """All results; also printed to the terminal."""
    lines = [", ".join(f"{key} {value}" for key, value in results.about.items() if value), ""]
    if results.conclusions:
        lines += ["### What to ship", "", *(f"- {line}" for line in results.conclusions), ""]
    if results.trials:
        lines += ["### Candidates", "", record_table(results.trials), ""]
    if results.checks:
        wrong = [f"- {c['backend']} {c['dtype']} {c['check']}: {line}" for c in results.checks for line in c["wrong"]]
        lines += ["### Checks", "", f"{len(results.checks)} run, {len(wrong)} failures", *wrong, ""]
    if results.rates:
        lines += ["### Ceilings and parts (TFLOP/s; copy: TB/s)", "", record_table(results.rates), ""]
    if results.bounds:
        lines += ["### Workspace", "", record_table(results.bounds), ""]
    for title in dict.fromkeys(_title(row) for row in results.rows):
        lines += [f"### {title}", "", row_table([row for row in results.rows if _title(row) == title]), ""]
    return "\n".join(lines + [f"- {line}" for line in results.left_out])


def row_table(rows: Sequence[Row]) -> str:
    """The rows of one problem, without empty columns."""
    keys = [key for key in COLUMNS if any(_cell(row, key) for row in rows)]
    return markdown_table([COLUMNS[key] for key in keys], [[_cell(row, key) for key in keys] for row in rows])


def record_table(items: Sequence[Rate] | Sequence[WorkspaceBound] | Sequence[Trial]) -> str:
    """Dataclass instances of one class, a column for each field."""
    values = [asdict(item) for item in items]
    return markdown_table(list(values[0]), [[_format_value(v) for v in value.values()] for value in values])


def write(results: Results, folder: Path) -> list[Path]:
    """results.json, results.csv and results.md; candidates.csv where there are trials."""
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
    """The results that :func:`write` wrote."""
    saved = json.loads((folder / "results.json").read_text())
    kinds: dict[str, Any] = {"rates": Rate, "bounds": WorkspaceBound, "rows": Row, "trials": Trial}
    return Results(**saved | {name: [kind(**item) for item in saved.get(name, [])] for name, kind in kinds.items()})


def _write_csv(path: Path, kind: type, items: Sequence[Any], about: dict[str, str]) -> None:
    """A line for each of ``items``, which are of dataclass ``kind``, with the environment in the last columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(kind)), *about])
        writer.writeheader()
        writer.writerows({**asdict(item), **about} for item in items)


def _format_value(value: Any) -> str:
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
