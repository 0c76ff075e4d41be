"""The block kernel in Triton: NVIDIA from compute capability 8.0, AMD CDNA, and CPU tensors under the interpreter."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.compiled import is_installed, why_not_launch
from siglip_kernels.backends.gpu import GpuBlockKernel
from siglip_kernels.backends.triton import configs

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_SCALED = 2**22  # elements; for fewer a launch by Triton takes the host longer than it saves the device


class TritonBlockKernel(GpuBlockKernel):
    """One launch per block. Only dz and three sums per tile reach memory, never the logits."""

    name = "triton"

    def __init__(self, config: configs.Config | None = None, **blocks: Any) -> None:
        """``config``: for every tile, instead of the shipped ones; ``blocks``: of GpuBlockKernel."""
        super().__init__(**blocks)
        self.config = config

    def is_automatic(self, problem: Problem) -> bool:
        return problem.device.type != "cpu"  # the interpreter is for tests

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype not in DTYPES:
            reasons.append(f"features are {problem.dtype}, expected float16, bfloat16 or float32")
        if problem.D < 1:
            reasons.append(f"D = {problem.D}, expected at least 1")
        if not is_installed():
            reasons.append("Triton is not installed")
        elif problem.device.type == "cpu":
            reasons += _why_not_interpret(problem)
        elif problem.device.type != "cuda":
            reasons.append(f"features are on {problem.device.type}, expected a CUDA or ROCm device")
        else:
            reasons += _why_not_device(problem.device) if torch.cuda.is_available() else ["no CUDA device"]
        return reasons

    def prepare(self) -> list[str]:
        reason = why_not_launch()
        return [] if reason is None else [reason]

    def workspace(self, problem: Problem, R: int, C: int) -> Tensor:
        """[3 · tiles] float32: the sums of every tile, for the smallest tiles that a ragged block may take."""
        return torch.empty(3 * configs.max_tiles(R, C, self.config), dtype=torch.float32, device=problem.device)

    def variant(self, task: BlockTask) -> configs.Variant:
        return _launcher().variant_of(architecture(task.x.device), task, self.config)

    def launch(self, variant: Any, task: BlockTask) -> None:
        _launcher().launch_block(variant, task)


@functools.cache
def _launcher() -> ModuleType:
    """What needs Triton."""
    from siglip_kernels.backends.triton import launch

    return launch


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", …; the interpreter stands in for a Hopper."""
    return "sm_90" if device.type == "cpu" else _architecture(device.index)


@functools.cache
def _architecture(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def scale_and_round(accumulator: Tensor, factor: Tensor, out: Tensor) -> bool:
    """``out = factor * accumulator``, rounded, on a GPU; False if it was not done, as for few elements."""
    if out.numel() < MIN_SCALED or accumulator.dtype is not torch.float32 or not is_installed() or why_not_launch():
        return False
    from siglip_kernels.backends.triton import scale

    return scale.scale_and_round(accumulator, factor, out)


def _why_not_interpret(problem: Problem) -> list[str]:
    import triton

    if not triton.knobs.runtime.interpret:
        return ["features are on the CPU, where Triton runs only under its interpreter"]
    if problem.dtype is torch.bfloat16:
        return ["Triton's interpreter computes bfloat16 wrongly"]
    return []


def _why_not_device(device: torch.device) -> list[str]:
    arch = _architecture(device.index)
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        return [f"compute capability {arch[3:-1]}.{arch[-1]} < 8.0"]
    return []
