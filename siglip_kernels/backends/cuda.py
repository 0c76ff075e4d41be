"""The block kernel in CUDA C++ for Hopper: csrc/cuda/sm90/, compiled by nvcc on first use.

It has not run on a GPU yet. Its arithmetic, tile order and barriers are tested on the host, its code by disassembly.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_char_p, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from siglip_kernels import build
from siglip_kernels.backends.base import DZ_BYTES, BlockKernel, BlockTask, Problem, even_block_shape
from siglip_kernels.backends.cpu_native import address
from siglip_kernels.gemm import pad_to_alignment

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # Dtype in csrc/cuda/sm90/params.h


class BlockParams(Structure):
    """``BlockParams`` of csrc/cuda/sm90/params.h."""

    _fields_ = (
        ("x", c_void_p),
        ("y", c_void_p),
        ("dz", c_void_p),
        ("partials", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("dz_scale", c_void_p),
        ("image_ids", c_void_p),
        ("text_ids", c_void_p),
        ("image_weights", c_void_p),
        ("text_weights", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("dz_stride", c_int64),
        ("rows", c_int32),
        ("cols", c_int32),
        ("features", c_int32),
        ("offset", c_int32),
        ("loss_only", c_int32),
        ("dtype", c_int32),
        ("device", c_int32),
    )


class CudaBlockKernel(BlockKernel):
    """TMA and WGMMA. The epilogue of one warpgroup overlaps with the products of the other."""

    name = "cuda"
    pads_to_alignment = True
    unproven = "not yet proven on a GPU"

    def why_not(self, problem: Problem) -> list[str]:
        reasons = []
        if problem.dtype not in DTYPES:
            reasons.append(f"features are {problem.dtype}, expected float16 or bfloat16")
        elif not problem.rounds_out:
            reasons.append(f"M·N = {problem.M * problem.N} pairs, too few for a dz in {problem.dtype}")
        if problem.D < 1:
            reasons.append(f"D = {problem.D}, expected at least 1")
        if not problem.plain:
            reasons.append("ignore_ids, multi_positive and return_stats are not in this kernel yet")
        if problem.device.type != "cuda":
            reasons.append(f"features are on {problem.device.type}, expected a CUDA device")
        elif not torch.cuda.is_available() or torch.version.hip:
            reasons.append("no CUDA device")
        else:
            capability = torch.cuda.get_device_capability(problem.device)
            if capability != (9, 0):
                reasons.append("compute capability {}.{}, expected 9.0".format(*capability))
        return reasons + build.why_not(build.TARGETS["cuda"])

    def prepare(self) -> list[str]:
        reason = _why_not_run()
        return [] if reason is None else [reason]

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        return problem.dtype

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        return even_block_shape(problem, DZ_BYTES // problem.dtype.itemsize)

    def workspace(self, problem: Problem, R: int, C: int) -> Tensor:
        """[3 · partials] float32: the sums of every warp in every tile."""
        return torch.empty(3 * _library().siglip_sm90_partials(R, C), dtype=torch.float32, device=problem.device)

    def block(self, task: BlockTask) -> None:
        library, (r, c) = _library(), (len(task.x), len(task.y))
        pairs, dz = task.pairs, task.dz
        # Keep x and y alive until the launch: BlockParams holds only addresses. After it the stream keeps their memory.
        x, y = pad_to_alignment(task.x), pad_to_alignment(task.y)
        partials = task.workspace[: 3 * library.siglip_sm90_partials(r, c)].view(3, -1)
        block = BlockParams(
            x=address(x),
            y=address(y),
            dz=address(dz),
            partials=address(partials),
            scale=address(task.scale),
            bias=address(task.bias),
            dz_scale=address(task.dz_scale),
            image_ids=address(pairs.image_ids),
            text_ids=address(pairs.text_ids),
            image_weights=address(pairs.image_weights),
            text_weights=address(pairs.text_weights),
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            dz_stride=0 if dz is None else dz.stride(0),
            rows=r,
            cols=c,
            features=x.shape[1],
            offset=pairs.offset_within(r, c),
            loss_only=task.loss_only,
            dtype=DTYPES[x.dtype],
            device=x.get_device(),
        )
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            error = library.siglip_sm90_block(ctypes.byref(block), stream)
        if error:
            raise RuntimeError(f"backend='cuda' failed to launch: {library.siglip_sm90_error(error).decode()}")
        written = 1 if task.loss_only else 3
        torch.sum(partials[:written], dim=1, dtype=task.sums.dtype, out=task.sums[:written])


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, compiled if it is not yet; or the reason why there is none."""
    try:
        return declare(build.load(build.TARGETS["cuda"]))
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
def _why_not_run() -> str | None:
    """Why there is no library, or why the driver cannot run it: it may be older than the nvcc here."""
    library = load()
    if isinstance(library, str):
        return library
    versions = (c_int32 * 2)()
    error = library.siglip_sm90_probe(versions)
    driver, own = (f"CUDA {version // 1000}.{version % 1000 // 10}" for version in versions)
    words = f"the driver is for {driver}, the library of {own}: "
    return words + library.siglip_sm90_error(error).decode() if error else None


def _library() -> ctypes.CDLL:
    library = load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library
