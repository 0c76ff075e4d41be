"""Results come back as they were written; the README's generated tables are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

from bench.microbenchmark import readme, report
from bench.microbenchmark.problems import FULL
from bench.microbenchmark.results import Rate, Results, Row, Trial, WorkspaceBound


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    results = Results(
        {"device": "a", "torch": "2"},
        checks=[{"check": "c", "backend": "eager", "dtype": "float32", "wrong": ["x"]}],
        rates=[Rate("copy", "1", 1.0, 0.5, 2.0, 3.0)],
        bounds=[WorkspaceBound(16, 1.0, 0.5, 2.0, None)],
        rows=[Row(FULL, "float32", 8, 4, "eager", 1.0, 0.5, 2.0)],
        trials=[Trial("diagonal", 4, "shipped", "tile", "block", 168, 0, 96.0, 1.0, 0.5, 2.0, 0.9)],
        conclusions=["keep it"],
        left_out=["B=9"],
        seconds={"a": 1.0},
    )
    report.write(results, tmp_path)
    assert report.read(tmp_path) == results
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["B"] == 8
    assert (tmp_path / "candidates.csv").read_text().splitlines()[0].endswith("note,device,torch")


def test_the_documents_tables_are_those_of_the_results() -> None:
    for path in readme.DOCUMENTS:
        text = path.read_text()
        assert readme.fill_tables(text) == text
        folders = (readme.ROOT / "bench" / "results").iterdir()
        assert any(f"<!-- {kind}/{folder.name}:" in text for folder in folders for kind in ("results", "headline"))


def test_a_table_is_filled_in(tmp_path: Path) -> None:
    rows = [
        Row(FULL, "bfloat16", 4096, 768, "floor", 2.0, 2.0, 2.0),
        Row(FULL, "bfloat16", 4096, 768, "ours (triton)", 4.0, 3.0, 5.0, floor_ratio=0.5, peak_mib=10.0),
        Row(FULL, "bfloat16", 4096, 768, "eager", 8.0, 7.0, 9.0, times_ours=2.0, peak_mib=1234.0),
        Row(FULL, "bfloat16", 4096, 768, "eager, graph", 8.0, 7.0, 9.0, times_ours=2.0),
        Row(FULL, "bfloat16", 5000, 768, "ours (triton)", 4.0, 3.0, 5.0),
    ]
    about = {
        "device": "a GPU",
        "threads": "1",
        "torch": "2",
        "triton": "3",
        "commit": "abc",
        "date": "d",
        "driver": "5",
    }
    report.write(Results(about, rows=rows), tmp_path / "a-gpu")
    before = "text\n" + readme.BEGIN.format("results", "a-gpu") + "old\n" + readme.END + "\nmore\n"
    after = readme.fill_tables(before, tmp_path)
    assert "a GPU, driver 5, torch 2" in after
    (line,) = [line for line in after.splitlines() if "4,096" in line]
    assert [cell.strip() for cell in line.split("|")[5:10]] == ["4.00 (triton)", "0.50", "2.00", "10", "1,234"]
    assert "5,000" not in after
    assert "graph" not in after
    assert "old" not in after
    assert after.startswith("text\n")
    assert after.endswith("\nmore\n")
