"""Distil a small dual encoder from a larger one that is trained already, and compare it with the same one alone.

The data are those of train_digits.py. The labels are by pair, as on the web: in a batch an image is positive for its
own caption alone, though other captions say the same digit. The teacher, trained with true labels, knows better: its
sigmoid is mixed into the target of every pair, and its M×N logits are never held.

    python examples/distill_digits.py                  # about half a minute on two CPU cores
    python examples/distill_digits.py --weight 1.0     # the teacher alone says what is positive
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from train_digits import CLASSES, LANGUAGES, Batch, Data, DualEncoder, ImageTower, TextTower, train, zero_shot_accuracy

from siglip_kernels import SigmoidLoss, Teacher


class Student(nn.Module):
    """A small image tower and a small text tower, trained by a frozen dual encoder, or by the labels alone."""

    def __init__(self, teacher: DualEncoder | None, weight: float, batch_size: int) -> None:
        super().__init__()
        self.image_tower, self.text_tower = ImageTower(width=4), TextTower(width=16, heads=2, layers=1)
        # b starts at the log odds of the targets: one text of a batch by the labels, a tenth by the teacher.
        weight = 0.0 if teacher is None else weight
        positive = (1 - weight) / batch_size + weight / CLASSES
        self.loss_fn = SigmoidLoss(init_logit_scale=10.0, init_logit_bias=math.log(positive / (1 - positive)))
        self.teacher, self.weight = [teacher], weight  # in a list: none of its weights are the student's

    def forward(self, batch: Batch) -> Tensor:
        x, y = self.image_tower(batch.images), self.text_tower(batch.tokens)
        (encoder,) = self.teacher
        if encoder is None:
            return self.loss_fn(x, y)
        with torch.no_grad():
            taught = encoder.image_tower(batch.images), encoder.text_tower(batch.tokens)
            scale, bias = encoder.loss_fn.logit_scale.exp(), encoder.loss_fn.logit_bias
            teacher = Teacher(*taught, scale, bias.detach(), self.weight)
        return self.loss_fn(x, y, teacher=teacher)


class Report(NamedTuple):
    """Zero-shot accuracy on held-out images, by language."""

    teacher: dict[str, float]
    alone: dict[str, float]
    distilled: dict[str, float]

    def __str__(self) -> str:
        lines = [f"{'captions':<9} {'teacher':>8} {'student alone':>14} {'distilled':>10}"]
        lines += [
            f"{name:<9} {self.teacher[name]:>8.1%} {self.alone[name]:>14.1%} {self.distilled[name]:>10.1%}"
            for name in LANGUAGES
        ]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weight", type=float, default=0.9, help="of the teacher, from 0 to 1")
    parser.add_argument("--teacher-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300, help="of either student")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    data = Data.load(torch.device("cpu"))
    loss_fn = SigmoidLoss(init_logit_scale=10.0, init_logit_bias=-math.log(CLASSES - 1))
    teacher = DualEncoder(ImageTower(), TextTower(), loss_fn)
    batches = data.batches(args.teacher_steps, args.batch_size, args.seed)
    train("teacher", teacher, batches, args.teacher_steps, args.lr)
    teacher.requires_grad_(False)

    accuracy = {}
    for name, of in (("student alone", None), ("distilled", teacher)):
        torch.manual_seed(args.seed + 1)  # the same start, the same batches
        student = Student(of, args.weight, args.batch_size)
        train(name, student, data.batches(args.steps, args.batch_size, args.seed + 1), args.steps, args.lr)
        accuracy[name] = zero_shot_accuracy(student.image_tower, student.text_tower, data)
    report = Report(zero_shot_accuracy(teacher.image_tower, teacher.text_tower, data), *accuracy.values())
    print(f"\n{report}")
    return report


if __name__ == "__main__":
    main()
