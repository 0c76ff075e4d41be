"""``python -m bench transformers`` runs on a CPU, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench.__main__ import main
from siglip_kernels.integrations import transformers as integration


def test_both_losses_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = integration.sigmoid_loss
    monkeypatch.setattr(integration, "sigmoid_loss", lambda *given, **how: calls.append(given) or ours(*given, **how))
    arguments = ["transformers", "--device", "cpu", "--batches", "8", "--seconds", "0.1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "transformers.json").read_text())["rows"]
    assert [row["loss"] for row in rows] == ["theirs", "ours"]
    assert all(row["ms"] > 0 and row["B"] == 8 for row in rows)
    # Warmed up, its memory read, then timed: theirs never comes here.
    assert len(calls) == 2 + rows[1]["rounds"]
    assert "| theirs |" in (tmp_path / "transformers.md").read_text()
