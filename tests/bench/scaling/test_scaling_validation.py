"""``python -m bench scaling --validate``: the slowest ranks are compared, and the real exchanges run."""

from __future__ import annotations

import pytest
import torch

from bench.scaling import validation


def test_a_trial_compares_the_slowest_ranks() -> None:
    """Round by round: the second has slower blocks and the same transfers."""
    transfers = {"ping small": [0.2] * 2, "ping": [2.0] * 2, "shift small": [0.1] * 2, "shift": [1.0] * 2}
    ranks = [
        {**transfers, "block": [10.0, 20.0], "ring": [31.0, 50.0], "gather": [22.0, 50.0]},
        {**transfers, "block": [5.0, 20.0], "ring": [42.2, 41.0], "gather": [24.0, 30.0]},
    ]
    found = validation.summarize("ring", 250, 1000, ranks)
    # Whole own block, the next, and the hop home, next_ranks an handshake of 0.1: 21.1 and 41.1 for the slower rank.
    assert found.predicted_ms == pytest.approx(1000 * (21.1 + 41.1) / 2)
    assert found.measured_ms == pytest.approx(1000 * (42.2 + 50) / 2)
    assert found.ratio == pytest.approx(((42.2 / 21.1 + 50 / 41.1) / 2, 50 / 41.1, 42.2 / 21.1))
    assert (found.ping_us, found.ping_gb_s) == pytest.approx((1e5, 1e-3))
    assert (found.shift_us, found.shift_gb_s) == pytest.approx((1e5, 1e-3))
    gather = validation.summarize("gather", 250, 1000, ranks)
    assert gather.predicted_ms == pytest.approx(1000 * (22.1 + 42.1) / 2)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_validation_runs_the_real_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    assert validation.main(rounds=2, worlds=(2,), batches=(32, 48), D=16) == 0
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in lines[0]] == [*validation.ValidationRow._fields]
    assert [[cell.strip() for cell in line[:3]] for line in lines[1:]] == [
        [algorithm, "2", b] for b in ("32", "48") for algorithm in ("ring", "gather")
    ]
    assert all(float(cell) > 0 for line in lines[1:] for cell in line[3:-1])
