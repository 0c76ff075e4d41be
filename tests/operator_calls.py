"""What tests of the operator share: its smallest calls, and a kernel that notes what it is asked for."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.teachers import Teacher
from siglip_kernels.testing import make_inputs

SUBSETS = list(itertools.product([False, True], repeat=4))
# M < N, so that the two feature gradients tell themselves apart by their rows; odd D.
SHAPE = (6, 9, 5)


def pairs_of(kind: str, M: int, N: int) -> dict[str, Any]:
    return {
        "offset": {"positive_offset": 2},
        "none": {"positive_offset": None},
        "ids": {"image_ids": torch.arange(M) % 3, "text_ids": torch.arange(N) % 4},
        "weights": {
            "image_weights": torch.arange(M) % 3 + 0.5,
            "text_weights": torch.arange(N) % 2,
            "reduction": "mean",
        },
        "ignore ids": {"image_ids": torch.arange(M) % 3, "text_ids": torch.arange(N) % 4, "ignore_ids": True},
        "multi-positive": {
            "image_ids": torch.arange(M) % 3,
            "text_ids": torch.arange(N) % 4,
            "multi_positive": "weights",
            "anchors": "texts",
        },
        "soft targets": {
            "image_ids": torch.arange(M) % 3,
            "text_ids": torch.arange(N) % 4,
            "text_weights": torch.arange(N) % 2,
            "multi_positive": "soft_targets",
        },
        "balance": {"positive_offset": 1, "positive_weight": 3.0, "label_smoothing": 0.125},
        "teachers": {"teacher": [Teacher(*make_inputs(M, N, D, torch.float32, seed=D), 0.25) for D in (3, 4)]},
    }[kind]


PAIRS = ("offset", "none", "ids", "weights", "ignore ids", "multi-positive", "soft targets", "balance", "teachers")


class RecordingKernel(EagerBlockKernel):
    """The eager kernel, which notes what each block was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, bool]] = []

    def block(self, task: BlockTask) -> None:
        self.asked.append((task.dz is not None, task.loss_only))
        super().block(task)
