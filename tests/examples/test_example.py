"""The example trains: on real images, in every mode, and in full to the accuracy it promises."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import load_module

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_digits.py"
FEW = ["--steps", "8", "--batch-size", "32"]


@functools.cache
def script() -> ModuleType:
    """The script as a module."""
    return load_module(SCRIPT)


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return script()


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """The script seeds the global generator and may set the threads."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def test_script_runs_by_itself() -> None:
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(SCRIPT), "--steps", "20", "--batch-size", "32", "--threads", "1"]
    done = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pairs: step") == 10
    assert "step   20/20, loss" in done.stdout
    assert all(language in done.stdout for language in ("English", "Korean", "German", "Japanese"))


@pytest.mark.parametrize("loss", ["sigmoid", "clip"])
@pytest.mark.parametrize("freeze", [False, True])
def test_loss_falls(digits: ModuleType, loss: str, freeze: bool) -> None:
    report = digits.main(["--loss", loss, *["--freeze-image"] * freeze, "--steps", "20", "--batch-size", "64"])
    assert len(report.losses) == 20
    assert sum(report.losses[-3:]) < 0.95 * sum(report.losses[:3])
    assert report.image_gradients == (0 if freeze else report.image_parameters)
    assert (report.logit_bias is None) == (loss == "clip")


def test_same_seed_same_numbers(digits: ModuleType) -> None:
    first, again, other = (digits.main([*FEW, "--seed", seed]) for seed in ("3", "3", "4"))
    assert first.losses == again.losses
    assert first.accuracy == again.accuracy
    assert first.losses != other.losses


class WatchedLoss(torch.nn.Module):
    """A loss that remembers which of its features needed a gradient."""

    def __init__(self, loss_fn: torch.nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.needed: list[tuple[bool, bool]] = []

    def forward(self, image_features: Tensor, text_features: Tensor, **ids: Any) -> Tensor:
        self.needed.append((image_features.requires_grad, text_features.requires_grad))
        return self.loss_fn(image_features, text_features, **ids)


def test_frozen_image_tower_stays_as_it_is(digits: ModuleType) -> None:
    torch.manual_seed(0)
    data = digits.Data.load(torch.device("cpu"))
    image_tower, text_tower, loss_fn = digits.ImageTower(), digits.TextTower(), WatchedLoss(digits.SigmoidLoss())
    model = digits.DualEncoder(image_tower.requires_grad_(False), text_tower, loss_fn)
    before = {name: [p.clone() for p in m.parameters()] for name, m in (("image", image_tower), ("text", text_tower))}
    scalars = [p.clone() for p in loss_fn.parameters()]

    digits.train("pairs", model, data.batches(4, 32, 0), 4, 1e-3)

    assert loss_fn.needed == [(False, True)] * 4
    assert all(p.grad is None for p in image_tower.parameters())
    assert all(torch.equal(p, old) for p, old in zip(image_tower.parameters(), before["image"], strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(text_tower.parameters(), before["text"], strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(loss_fn.parameters(), scalars, strict=True))


def test_captions(digits: ModuleType) -> None:
    texts = [text for language in digits.LANGUAGES.values() for row in language.captions() for text in row]
    assert len(set(texts)) == len(texts) == 4 * 4 * 10
    tokens = digits.tokenize(texts)
    assert [bytes(row[row > 0].tolist()).decode() for row in tokens] == texts
    with pytest.raises(ValueError, match="36 bytes"):
        digits.tokenize(["x" * 37])


def test_held_out_images_are_held_out(digits: ModuleType) -> None:
    data = digits.Data.load(torch.device("cpu"))
    train, test = (
        {tuple(image.flatten().tolist()) for image in part} for part in (data.train_images, data.test_images)
    )
    assert len(data.test_images) == 450
    assert not train & test


def test_clip_loss_is_clips_own_without_shared_ids(digits: ModuleType) -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(6, 5), dim=-1) for _ in range(2))
    loss_fn, ids = digits.ClipLoss(), torch.arange(6)
    logits = x @ y.T / 0.07
    expected = (torch.nn.functional.cross_entropy(logits, ids) + torch.nn.functional.cross_entropy(logits.T, ids)) / 2
    torch.testing.assert_close(loss_fn(x, y, image_ids=ids, text_ids=ids, process_group=None), expected)


def test_full_run_reads_held_out_digits(digits: ModuleType) -> None:
    """The script's own settings, under half a minute on two cores."""
    report = digits.main([])
    assert min(report.accuracy.values()) > 0.9, report.accuracy


@pytest.mark.parametrize(
    ("flags", "message"), [(["--batch-size", "31"], "31 must be a multiple"), (["--loss", "clip"], "for one process")]
)
def test_two_processes_are_refused(
    digits: ModuleType, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As torchrun starts them; before any waits for the other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        digits.main(flags)
    assert message in capsys.readouterr().err
