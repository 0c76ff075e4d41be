"""The block kernel in CUDA C++ for Hopper: csrc/cuda/sm90/, compiled by NVRTC on first use.

tests/hopper/ runs it on an emulated Hopper; its code is checked by disassembly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.cuda import driver, kernels, nvrtc
from siglip_kernels.backends.cuda.kernels import Compilation
from siglip_kernels.backends.gpu import GpuBlockKernel, reduce_partials
from siglip_kernels.gemm import pad_to_alignment
from siglip_kernels.stats import SIZE


class CudaBlockKernel(GpuBlockKernel):
    """TMA and WGMMA. The epilogue of one warpgroup overlaps with the products of the other."""

    name = "cuda"

    def is_automatic(self, problem: Problem) -> bool:
        # With weights Triton's kernel is faster, measured on an H200.
        return problem.device.type == "cuda" and not problem.has_weights

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"features are {problem.dtype}, expected float16 or bfloat16")
        if problem.D < 1:
            reasons.append(f"D = {problem.D}, expected at least 1")
        if problem.by_image:
            reasons.append("the loss of each image is asked for")
        reasons += _why_not_device(problem.device)
        missing = nvrtc.why_not()
        return reasons if missing is None else [*reasons, missing]

    def prepare(self) -> list[str]:
        reason = _why_not_run()
        return [] if reason is None else [reason]

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        partials = torch.empty(3, kernels.num_partials(R, C), dtype=torch.float32, device=problem.device)
        return Workspace(partials, problem.dtype)

    def variant(self, task: BlockTask) -> Variant:
        pairs, dz, dtype = task.pairs, task.dz, task.workspace.dtype
        outputs = task.loss_only, None if dz is None else dz.dtype, task.stats is not None
        labels = pairs.has_ids, pairs.ignore_ids, pairs.has_weights, pairs.multi_positive
        return _variant(dtype, *outputs, *labels, pairs.has_balance, task.teacher is not None)

    def launch(self, variant: Any, task: BlockTask) -> None:
        workspace: Workspace = task.workspace
        width = kernels.num_partials(task.x.shape[0], task.y.shape[0])
        partials = workspace.partials
        if partials.shape[1] != width:  # a smaller block than the largest
            partials = partials.as_strided((3, width), (width, 1))
        stats = None if task.stats is None else partials.new_empty(SIZE, width)
        # Features that the schedule has widened become what they were. They live until the launch, for the parameters
        # hold only addresses; after it the stream keeps their memory.
        x, y = _operand(task.x, workspace.dtype), _operand(task.y, workspace.dtype)
        kernels.launch(variant.compilation, task, x, y, partials, stats)
        reduce_partials(task, partials, stats)


class Variant(NamedTuple):
    """What decides which code of the kernel runs."""

    compilation: Compilation
    ids: str
    weights: str
    balance: bool
    teacher: bool


@functools.cache
def _variant(
    dtype: torch.dtype,
    loss_only: bool,
    dz_dtype: torch.dtype | None,
    stats: bool,
    has_ids: bool,
    ignore_ids: bool,
    has_weights: bool,
    multi_positive: str | None,
    balance: bool,
    teacher: bool,
) -> Variant:
    in_float32 = dz_dtype is torch.float32
    output = "kLoss" if loss_only else "kSums" if dz_dtype is None else "kFloat32Dz" if in_float32 else "kDz"
    kind = "kStats" if stats else "kGeneral" if has_ids or has_weights or in_float32 else "kOffset"
    return Variant(
        Compilation(dtype, kind, output),
        ids="ignored" if ignore_ids else "given" if has_ids else "none",
        weights=multi_positive or ("given" if has_weights else "none"),
        balance=balance,
        teacher=teacher,
    )


class Workspace(NamedTuple):
    """What the kernel needs besides the task."""

    partials: Tensor  # [3, partials] float32: the sums of every warp in every tile
    dtype: torch.dtype  # of the features, as the kernel takes them


def _operand(features: Tensor, dtype: torch.dtype) -> Tensor:
    return pad_to_alignment(features if features.dtype is dtype else features.to(dtype))


@functools.cache
def _why_not_device(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"features are on {device.type}, expected a CUDA device"]
    if not torch.cuda.is_available() or torch.version.hip:
        return ["no CUDA device"]
    capability = torch.cuda.get_device_capability(device)
    return [] if capability == (9, 0) else ["compute capability {}.{}, expected 9.0".format(*capability)]


@functools.cache
def _why_not_run() -> str | None:
    """Why nothing can be compiled, or why the driver would not load it: it may be older than NVRTC."""
    try:
        compiler, newest = nvrtc.version(), driver.version()
    except (nvrtc.CompileError, driver.DriverError) as error:
        return str(error)
    if newest[0] < compiler[0]:
        return "the driver is for CUDA {}.{}, NVRTC of CUDA {}.{}".format(*newest, *compiler)
    return None
