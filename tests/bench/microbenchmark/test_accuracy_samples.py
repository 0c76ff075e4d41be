"""Errors on a sample of rows are those of the whole; the loss only where float64 is affordable."""

from __future__ import annotations

import pytest
import torch

from bench.microbenchmark import accuracy
from siglip_kernels.testing import gold, make_inputs, relative_l2


def test_sampled_errors_are_those_of_the_whole() -> None:
    inputs = make_inputs(300, 300, 16, torch.float64)
    expected, sample = gold(inputs), accuracy.sampled_gold(inputs)
    assert relative_l2(sample.loss, expected.loss) < 1e-12
    assert relative_l2(sample.dx, expected.image_features[sample.rows]) < 1e-12
    assert relative_l2(sample.dy, expected.text_features[sample.rows]) < 1e-12


def test_the_loss_is_left_out_where_float64_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "MAX_LOSS_PAIRS", 40 * 40)
    for B, formed in ((40, True), (41, False)):
        inputs = make_inputs(B, B, 8, torch.float32)
        gold = accuracy.sampled_gold(inputs)
        assert (gold.loss is not None) == formed
        assert (accuracy.sampled_errors(gold, torch.zeros(()), inputs)["loss_error"] is not None) == formed
