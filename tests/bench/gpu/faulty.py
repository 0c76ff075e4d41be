"""Block kernels with a fault that the checks must find, and the interpreter that runs Triton's without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.backends.triton import TritonBlockKernel


class LosesRow(EagerBlockKernel):
    """The last row of dz is 0."""

    def block(self, *args: Any, **out: Any) -> None:
        super().block(*args, **out)
        if out["dz"] is not None:
            out["dz"][-1] = 0


class OutOfResource(TritonBlockKernel):
    """Cannot be launched."""

    def block(self, *arguments: Any, **out: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")


def needs_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
