"""The example of distillation trains, and the teacher helps."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import load_module

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return load_module(EXAMPLES / "distill_digits.py")


def test_a_distilled_student_is_better_than_the_same_alone(distill: ModuleType) -> None:
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            report = distill.main(["--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    mean = {name: sum(accuracy.values()) / 4 for name, accuracy in report._asdict().items()}
    assert mean["teacher"] > 0.97
    assert mean["distilled"] > mean["alone"] + 0.03
    assert "student alone" in str(report)


def test_the_teacher_stays_as_it_is(distill: ModuleType) -> None:
    torch.manual_seed(0)
    teacher = distill.DualEncoder(distill.ImageTower(), distill.TextTower(), distill.SigmoidLoss())
    teacher.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = distill.Student(teacher, 0.5, 32)
    data = distill.Data.load(torch.device("cpu"))
    distill.train("", student, data.batches(2, 32, 0), 2, 1e-3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name, _ in student.named_parameters())
