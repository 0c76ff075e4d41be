"""A locked Hugging Face encoder costs the loss two products instead of three, and stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from bench import load_module
from siglip_kernels import gemm
from siglip_kernels.backends.eager import EagerBlockKernel

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, beside the one it imports; it seeds the global generator and sets the threads."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield load_module(EXAMPLES / "locked_tower.py")
    torch.set_num_threads(threads)


class Counted:
    """What the eager kernel multiplies: the logits by block, a gradient by gemm.gemm_."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = self.gradients = 0
        block, gemm_ = EagerBlockKernel.block, gemm.gemm_

        def counted_block(kernel: EagerBlockKernel, *arguments: Any, **named: Any) -> None:
            self.blocks += 1
            block(kernel, *arguments, **named)

        def counted_gemm_(*arguments: Any, **named: Any) -> None:
            self.gradients += 1
            gemm_(*arguments, **named)

        monkeypatch.setattr(EagerBlockKernel, "block", counted_block)
        monkeypatch.setattr(gemm, "gemm_", counted_gemm_)

    @property
    def products(self) -> int:
        return self.blocks + self.gradients


def model(example: ModuleType, locked: bool) -> torch.nn.Module:
    encoder = example.SiglipVisionModel(example.SiglipVisionConfig(**example.CONFIG, **example.PATCHES))
    tower = example.VisionTower(encoder)
    loss_fn = example.SigmoidLoss(backend="eager")
    text_tower = example.ProjectedTextTower(encoder.config.hidden_size)
    return example.DualEncoder(example.locked(tower) if locked else tower, text_tower, loss_fn)


@pytest.mark.parametrize(("locked", "products"), [(True, 2), (False, 3)])
def test_products_of_a_step(example: ModuleType, monkeypatch: pytest.MonkeyPatch, locked: bool, products: int) -> None:
    towers = model(example, locked)
    (batch,) = example.Data.load(torch.device("cpu")).batches(1, 32, 0)
    counted = Counted(monkeypatch)
    towers(batch).backward()
    assert counted.blocks == 1
    assert counted.products == products


def test_locked_encoder_stays_as_it_is(example: ModuleType) -> None:
    towers = model(example, locked=True)
    before = {name: weight.clone() for name, weight in towers.state_dict().items()}
    example.train("pairs", towers, example.Data.load(torch.device("cpu")).batches(3, 32, 0), 3, 1e-3)
    after = towers.state_dict()
    unchanged = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert unchanged == {name for name in before if name.startswith("image_tower.")}
    assert all(p.grad is None for p in towers.image_tower.parameters())


def test_loss_falls(example: ModuleType) -> None:
    report = example.main(["--classifier-steps", "8", "--steps", "16", "--batch-size", "64", "--threads", "1"])
    assert len(report.losses) == 16
    assert sum(report.losses[-3:]) < 0.9 * sum(report.losses[:3])
    assert report.image_parameters > 0
    assert report.image_gradients == 0


def test_full_run_reads_held_out_digits(example: ModuleType) -> None:
    """The script's own settings, but for the threads: on a busy machine two wait for each other."""
    report = example.main(["--threads", "1"])
    assert min(report.accuracy.values()) > 0.9, report.accuracy
