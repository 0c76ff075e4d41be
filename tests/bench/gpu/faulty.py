"""Block kernels with a fault that the checks must find, and the interpreter that runs Triton's without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel


class LosesRow(EagerBlockKernel):
    """The last row of dz is 0."""

    def block(self, task: BlockTask) -> None:
        super().block(task)
        if task.dz is not None:
            task.dz[-1] = 0


class OutOfResource(TritonBlockKernel):
    """Cannot be launched."""

    def block(self, task: BlockTask) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def launch_only(launch: Callable[[BlockTask], None], task: BlockTask) -> dict[str, float]:
    """In the place of comparison.errors_of_launch, where launches compute nothing."""
    launch(task)
    return {}


def needs_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
