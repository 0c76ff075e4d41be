"""The block kernel in CUDA C++ for Hopper: csrc/cuda/sm90/, compiled by nvcc on first use.

tests/hopper/ runs it on an emulated Hopper; its code is checked by disassembly.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build, targets
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.cpu_native import address
from siglip_kernels.backends.gpu import GpuBlockKernel, reduce_partials
from siglip_kernels.gemm import pad_to_alignment
from siglip_kernels.stats import SIZE

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # Dtype in csrc/cuda/sm90/params.h
SHIPPED = "128x128"  # of targets.SM90_CONFIGURATIONS


class BlockParams(Structure):
    """``BlockParams`` of csrc/cuda/sm90/params.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        ("dz", c_void_p),
        ("partials", c_void_p),
        ("stats", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("dz_scale", c_void_p),
        ("image_ids", c_void_p),
        ("text_ids", c_void_p),
        ("image_weights", c_void_p),
        ("text_weights", c_void_p),
        ("image_masses", c_void_p),
        ("text_masses", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("dz_stride", c_int64),
        ("rows", c_int32),
        ("cols", c_int32),
        ("features", c_int32),
        ("offset", c_int32),
        ("ignore_ids", c_int32),
        ("soft_targets", c_int32),
        ("loss_only", c_int32),
        ("dtype", c_int32),
        ("float32_dz", c_int32),
        ("device", c_int32),
    )


class CudaBlockKernel(GpuBlockKernel):
    """TMA and WGMMA. The epilogue of one warpgroup overlaps with the products of the other."""

    name = "cuda"

    def __init__(self, configuration: str = SHIPPED, **blocks: Any) -> None:
        """``configuration``: of targets.SM90_CONFIGURATIONS; ``blocks``: of GpuBlockKernel."""
        super().__init__(**blocks)
        self.configuration = configuration

    def is_automatic(self, problem: Problem) -> bool:
        return not problem.has_weights  # with weights Triton's kernel is faster, measured on an H200

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype not in DTYPES:
            reasons.append(f"features are {problem.dtype}, expected float16 or bfloat16")
        if problem.D < 1:
            reasons.append(f"D = {problem.D}, expected at least 1")
        if problem.device.type != "cuda":
            reasons.append(f"features are on {problem.device.type}, expected a CUDA device")
        elif not torch.cuda.is_available() or torch.version.hip:
            reasons.append("no CUDA device")
        else:
            capability = torch.cuda.get_device_capability(problem.device)
            if capability != (9, 0):
                reasons.append("compute capability {}.{}, expected 9.0".format(*capability))
        return reasons + build.why_not(targets.SM90_CONFIGURATIONS[self.configuration])

    def prepare(self) -> list[str]:
        reason = _why_not_run(self.configuration)
        return [] if reason is None else [reason]

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        # A cluster has nothing to share in the small problems that need dz in float32.
        library = _library(self.configuration if problem.rounds_out else SHIPPED)
        partials = torch.empty(3 * library.siglip_sm90_partials(R, C), dtype=torch.float32, device=problem.device)
        return Workspace(partials, problem.dtype, library)

    def variant(self, task: BlockTask) -> Variant:
        pairs, dz = task.pairs, task.dz
        output = "loss" if task.loss_only else "sums" if dz is None else str(dz.dtype).removeprefix("torch.")
        return Variant(
            self.configuration,
            task.workspace.dtype,
            output,
            ids="ignored" if pairs.ignore_ids else "given" if pairs.has_ids else "none",
            weights=pairs.multi_positive or ("given" if pairs.has_weights else "none"),
            stats=task.stats is not None,
        )

    def launch(self, variant: Any, task: BlockTask) -> None:
        workspace: Workspace = task.workspace
        library = workspace.library
        width = library.siglip_sm90_partials(len(task.x), len(task.y))
        partials = workspace.partials[: 3 * width].view(3, width)
        stats = None if task.stats is None else partials.new_empty(SIZE, width)
        # Features that the schedule has widened become what they were. They live until the launch, for the parameters
        # hold only addresses; after it the stream keeps their memory.
        x, y = (pad_to_alignment(features.to(workspace.dtype)) for features in (task.x, task.y))
        params = _params(task, x, y, partials, stats)
        error = library.siglip_sm90_block(ctypes.byref(params), torch.cuda.current_stream().cuda_stream)
        if error:
            raise RuntimeError(f"backend='cuda' failed to launch: {library.siglip_sm90_error(error).decode()}")
        reduce_partials(task, partials, stats)


class Variant(NamedTuple):
    """What decides which code of the kernel runs."""

    configuration: str
    dtype: torch.dtype  # of the features
    output: str  # the dtype of dz; else "sums" or "loss"
    ids: str
    weights: str
    stats: bool


class Workspace(NamedTuple):
    """What the kernel needs besides the task."""

    partials: Tensor  # [3 · partials] float32: the sums of every warp in every tile
    dtype: torch.dtype  # of the features, as the kernel takes them
    library: ctypes.CDLL


def _params(task: BlockTask, x: Tensor, y: Tensor, partials: Tensor, stats: Tensor | None) -> BlockParams:
    pairs, dz = task.pairs, task.dz
    return BlockParams(
        x=address(x),
        y=address(y),
        dz=address(dz),
        partials=address(partials),
        stats=address(stats),
        scale=address(task.scale),
        bias=address(task.bias),
        dz_scale=address(task.dz_scale),
        image_ids=address(pairs.image_ids),
        text_ids=address(pairs.text_ids),
        image_weights=address(pairs.image_weights),
        text_weights=address(pairs.text_weights),
        image_masses=address(pairs.image_masses),
        text_masses=address(pairs.text_masses),
        x_stride=x.stride(0),
        y_stride=y.stride(0),
        dz_stride=0 if dz is None else dz.stride(0),
        rows=len(x),
        cols=len(y),
        features=x.shape[1],
        offset=pairs.offset_within(len(x), len(y)),
        ignore_ids=pairs.ignore_ids,
        soft_targets=pairs.multi_positive == "soft_targets",
        loss_only=task.loss_only,
        dtype=DTYPES[x.dtype],
        float32_dz=dz is not None and dz.dtype is torch.float32,
        device=x.get_device(),
    )


@functools.cache
def load(configuration: str) -> ctypes.CDLL | str:
    """The library of targets.SM90_CONFIGURATIONS, compiled if it is not yet; or the reason why there is none."""
    try:
        return declare(build.load(targets.SM90_CONFIGURATIONS[configuration]))
    except (build.BuildError, OSError, AttributeError) as error:
        return str(error)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """``library`` with the types of its functions; AttributeError if one is missing."""
    for name, arguments, result in (
        ("siglip_sm90_probe", (c_void_p,), c_int32),
        ("siglip_sm90_block", (c_void_p, c_void_p), c_int32),
        ("siglip_sm90_partials", (c_int32, c_int32), c_int64),
        ("siglip_sm90_shared_bytes", (), c_int64),
        ("siglip_sm90_error", (c_int32,), c_char_p),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


@functools.cache
def _why_not_run(configuration: str) -> str | None:
    """Why there is no library, or why the driver cannot run it: it may be older than the nvcc here."""
    library = load(configuration)
    if isinstance(library, str):
        return library
    versions = (c_int32 * 2)()
    error = library.siglip_sm90_probe(versions)
    driver, own = (f"CUDA {version // 1000}.{version % 1000 // 10}" for version in versions)
    words = f"the driver is for {driver}, the library of {own}: "
    return words + library.siglip_sm90_error(error).decode() if error else None


def _library(configuration: str) -> ctypes.CDLL:
    library = load(configuration)
    if isinstance(library, str):
        raise RuntimeError(library)
    return library
