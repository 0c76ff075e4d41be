"""The checks of ``python -m bench gpu`` find what is wrong, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import checks
from siglip_kernels import backends
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel
from tests.bench.gpu.faulty import LosesRow

CPU = torch.device("cpu")


TINY = (40, 50, 16)


class Uncounted(EagerBlockKernel):
    """Its statistics miss a pair, or a block's least logit."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.stats is not None:
            task.stats[self.index] += self.change

    def __init__(self, index: int = 0, change: float = 0.0) -> None:
        super().__init__()
        self.index, self.change = index, change


@pytest.mark.parametrize(
    ("index", "change", "wrong"),
    [
        (0, 0.0, set()),
        (0, 1.0, {"positive_mean"}),
        (2, 1.0, {"positive_mean", "positive_count"}),
        (3, -1.0, {"negative_mean", "negative_count"}),
        (5, -0.01, {"negative_min"}),
    ],
)
def test_logit_stats(index: int, change: float, wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", Uncounted(index, change))
    found = checks.logit_stats("eager", CPU, torch.float32, ["diagonal", "soft targets"], TINY)
    assert {line.split()[-4] for line in found if line.startswith("diagonal")} == wrong
    assert {line.split()[-4] for line in found} >= wrong


class Restless(EagerBlockKernel):
    """Gives other bits every other time."""

    calls = 0

    def block(self, task: BlockTask) -> None:
        super().block(task)
        self.calls += 1
        if self.calls % 2:
            task.dz[3, 5] *= 1 + 1e-6


class Unwritten(EagerBlockKernel):
    """Leaves an element of dz as it was."""

    def block(self, task: BlockTask) -> None:
        kept = task.dz[3, 5].clone()
        super().block(task)
        task.dz[3, 5] = kept


@pytest.mark.parametrize(("kernel", "wrong"), [(EagerBlockKernel, 0), (Restless, 20), (Unwritten, 40)])
def test_bitwise_repeatable(kernel: type[EagerBlockKernel], wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    found = checks.bitwise_repeatable("eager", CPU, torch.float32, TINY)
    assert len(found) >= wrong
    assert bool(found) == bool(wrong)


@pytest.mark.parametrize(("kernel", "wrong"), [(EagerBlockKernel, set()), (LosesRow, {"dx_error", "dy_error"})])
def test_index_overflow(kernel: type[EagerBlockKernel], wrong: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "eager", kernel())
    # 128 sampled rows of 128: the last one too.
    found = checks.index_overflow("eager", CPU, torch.float32, 128, 16)
    assert {line.split()[0] for line in found} == wrong
