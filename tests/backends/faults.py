"""GPU kernels of which a fault can be made, where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.comparison import run_eager
from siglip_kernels.backends.gpu import GpuBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel


class Variant(NamedTuple):
    dtype: torch.dtype
    has_positives: bool
    loss_only: bool


class HostKernel(GpuBlockKernel):
    """Plain torch in the place of a GPU kernel; ``launches``: of which variants."""

    name = "triton"

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def why_not(self, problem: Problem) -> list[str]:
        return ["features are float64"] if problem.dtype is torch.float64 else []

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        return 128, 160

    def workspace(self, problem: Problem, R: int, C: int) -> None:
        return None

    def variant(self, task: BlockTask) -> Variant:
        return Variant(task.x.dtype, task.pairs.may_have_positives(len(task.x), len(task.y)), task.loss_only)

    def launch(self, variant: Any, task: BlockTask) -> None:
        self.launches.append(variant)
        run_eager(task)


class InterpretedKernel(TritonBlockKernel):
    """Triton's, where "auto" would not take it."""

    def __init__(self) -> None:
        super().__init__(blocks=(128, 160))
        self.launches: list[Any] = []

    def is_automatic(self, problem: Problem) -> bool:
        return not self.why_not(problem)

    def launch(self, variant: Any, task: BlockTask) -> None:
        self.launches.append(variant)
        super().launch(variant, task)


KERNELS: tuple[type[GpuBlockKernel], ...] = (HostKernel, InterpretedKernel)


def wrong_sign(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz.neg_()


def negatives_dropped(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz.mul_(task.pairs.positive_mask(*task.dz.shape, task.x.device))


def positives_dropped(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz.mul_(~task.pairs.positive_mask(*task.dz.shape, task.x.device))


def small_negatives_inexact(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz.mul_(torch.where(task.dz.abs() < 1e-3 * task.dz.abs().amax(), 1.05, 1.0))


def nan(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz[-1, -1] = torch.nan


def tile_of_zeros(task: BlockTask) -> None:
    if task.dz is not None:
        task.dz[-16:, 32:48] = 0


def loss_of_positives_alone(task: BlockTask) -> None:
    task.sums[0] *= 0.999


def sum_without_last_tile(task: BlockTask) -> None:
    task.sums[1] = task.sums[1] * 0.5


def sum_of_wrong_sign(task: BlockTask) -> None:
    task.sums[2] *= -1


def cannot_compile(task: BlockTask) -> None:
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def cannot_launch(task: BlockTask) -> None:
    raise ValueError("ptxas died with signal 11")


# What is changed after a right launch, and what must be said of it; None: outputs stay unwritten.
FAULTS: dict[Callable[[BlockTask], None] | None, str] = {
    None: "loss nan",
    wrong_sign: " dz ",
    negatives_dropped: " dz ",
    positives_dropped: " dz ",
    small_negatives_inexact: " dz ",
    nan: " dz nan",
    tile_of_zeros: " dz ",
    loss_of_positives_alone: " loss ",
    sum_without_last_tile: "Σ dz·u",
    sum_of_wrong_sign: "Σ dz ",
    cannot_compile: "cannot run here: out of resource: shared memory. Kernel",
    cannot_launch: "cannot run here: ptxas died with signal 11",
}


def faulty(base: type[GpuBlockKernel], fault: Callable[[BlockTask], None] | None) -> GpuBlockKernel:
    class Faulty(base):  # type: ignore[misc, valid-type]
        def launch(self, variant: Any, task: BlockTask) -> None:
            if fault is None:
                self.launches.append(variant)
                return
            super().launch(variant, task)
            fault(task)

    return Faulty()
