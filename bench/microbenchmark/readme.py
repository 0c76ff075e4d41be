"""``python -m bench readme``: fills the tables between the documents' markers from ``bench/results/*/results.json``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from bench.harness.tables import markdown_table
from bench.microbenchmark import report
from bench.microbenchmark.problems import FULL
from bench.microbenchmark.results import Results, Row

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
# "results": a table of everything; "headline": of large batches with every gradient.
BEGIN, END = "<!-- {}/{}: python -m bench readme -->\n", "<!-- end -->"
# The documents show these batches only.
HEADLINE_BASELINES = ("eager", "torch.compile", "siglip-kernel")
SHOWN_BATCHES = (64, 256, 1024, 4096, 6144, 16_384, 32_768, 65_536, 262_144, 2**20)


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m bench readme", description=__doc__).parse_args(arguments)
    for path in DOCUMENTS:
        path.write_text(fill_tables(path.read_text()))
    return 0


def fill_tables(text: str, results: Path = ROOT / "bench" / "results") -> str:
    """``text`` with the current table of each results folder that its markers name."""
    pattern = re.compile(BEGIN.format("(results|headline)", r"([\w.-]+)") + ".*?" + END, re.DOTALL)

    def section(match: re.Match[str]) -> str:
        kind, folder = match.groups()
        found = report.read(results / folder)
        table = summary_table(found) if kind == "results" else headline_table(found)
        return BEGIN.format(kind, folder) + table + "\n" + END

    return pattern.sub(section, text)


def summary_table(results: Results) -> str:
    """Device and versions, then one row for each problem: our time, ratios to floor and baselines, memory."""
    rows = [row for row in results.rows if row.B in SHOWN_BATCHES]
    names = dict.fromkeys(row.contender for row in rows)
    baselines = [name for name in names if not name.startswith(("ours", "floor")) and not name.endswith("graph")]
    head = ["mode", "dtype", "B", "D", "ms", "floor ratio", *(f"{name} / ours" for name in baselines)]
    head += ["peak MiB", *(f"{name}, MiB" for name in baselines), "loss error", "dx error"]
    problems: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault((row.mode, row.dtype, row.B, row.D), {})[row.contender] = row
    lines = [_cells(by_name, baselines) for by_name in problems.values()]
    return f"{_source(results)}\n\n{markdown_table(head, lines)}\n"


def headline_table(results: Results) -> str:
    """Of large batches with every gradient: our time and memory beside the baselines'."""
    head = ["B", "D", "ms", "floor ratio", *(f"{name} / ours" for name in HEADLINE_BASELINES), "MiB", "eager, MiB"]
    problems: dict[tuple[int, int], dict[str, Row]] = {}
    for row in results.rows:
        if row.mode == FULL and row.B >= 32_768 and row.B in SHOWN_BATCHES:
            problems.setdefault((row.B, row.D), {})[row.contender] = row
    lines = []
    for (B, D), rows in sorted(problems.items(), key=lambda item: item[0][::-1]):
        ours = next(row for name, row in rows.items() if name.startswith("ours"))
        ratios = [_baseline_cell(rows, name, "times_ours", "{:.2f}") for name in HEADLINE_BASELINES]
        memory = [_baseline_cell(rows, name, "peak_mib", "{:,.0f}") for name in (ours.contender, "eager")]
        lines.append([f"{B:,}", str(D), f"{ours.ms:,.1f}", f"{ours.floor_ratio:.2f}", *ratios, *memory])
    return f"{_source(results)}\n\n{markdown_table(head, lines)}\n"


def _source(results: Results) -> str:
    """Device, versions, commit and date of the figures."""
    about = results.about
    where = f"{about['device']}, {about['threads']} threads" if "AVX" in about["device"] else about["device"]
    versions = f"torch {about['torch']}, Triton {about['triton'] or 'none'}, commit {about['commit']}, {about['date']}"
    driver = f", driver {about['driver']}" if about["driver"] else ""
    return f"{where}{driver}, {versions}."


def _cells(rows: dict[str, Row], baselines: Sequence[str]) -> list[str]:
    ours = next(row for name, row in rows.items() if name.startswith("ours"))
    return [
        *(ours.mode, ours.dtype, f"{ours.B:,}", str(ours.D)),
        f"{ours.ms:,.{1 if (ours.ms or 0) >= 10 else 2}f} ({ours.contender[6:-1]})",
        "" if ours.floor_ratio is None else f"{ours.floor_ratio:.2f}",
        *(_baseline_cell(rows, name, "times_ours", "{:.2f}") for name in baselines),
        "" if ours.peak_mib is None else f"{ours.peak_mib:,.0f}",
        *(_baseline_cell(rows, name, "peak_mib", "{:,.0f}") for name in baselines),
        "" if ours.loss_error is None else f"{ours.loss_error:.0e}",
        "" if ours.dx_error is None else f"{ours.dx_error:.0e}",
    ]


def _baseline_cell(rows: dict[str, Row], name: str, field: str, form: str) -> str:
    value = getattr(rows.get(name), field, None)
    return "" if value is None else form.format(value)
