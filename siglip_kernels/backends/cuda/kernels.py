"""The compilations of csrc/cuda/sm90/kernel.cu: by NVRTC on first use, kept in the cache, launched by the driver."""

from __future__ import annotations

import ctypes
import functools
import itertools
from contextlib import suppress
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build, cache
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.cpu_native import address
from siglip_kernels.backends.cuda import driver, nvrtc

SOURCE = build.CSRC / "cuda" / "sm90" / "kernel.cu"
NAME = "siglip_sm90_block"
# What the launcher takes for granted; kernel.cu asserts it.
TILE, BOX_COLUMNS = 128, 64  # images and texts of a tile; features, and texts of dz, in a box of TMA's
PARTIALS = 4  # sums of each kind in a tile: one a warp
THREADS, SHARED_BYTES = 384, 231_424  # of a thread block


class Compilation(NamedTuple):
    """What the kernel is specialized for."""

    dtype: torch.dtype  # of the features and of dz, float16 or bfloat16
    pairs: str  # Pairs of epilogue.cuh: "kOffset", "kGeneral" or "kStats"
    output: str  # Output of epilogue.cuh: "kDz", "kFloat32Dz", "kSums" or "kLoss"

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.pairs} {self.output}"


# Pairs by their offset alone need no dz in float32: the few pairs of a small problem are kGeneral.
EVERY = [
    Compilation(*parts)
    for parts in itertools.product(
        (torch.bfloat16, torch.float16), ("kOffset", "kGeneral", "kStats"), ("kDz", "kFloat32Dz", "kSums", "kLoss")
    )
    if parts[1:] != ("kOffset", "kFloat32Dz")
]


class BlockParams(Structure):
    """``BlockParams`` of csrc/cuda/sm90/params.h."""

    _fields_ = (
        ("partials", c_void_p),
        ("stats", c_void_p),
        ("float32_dz", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("dz_scale", c_void_p),
        ("image_ids", c_void_p),
        ("text_ids", c_void_p),
        ("image_weights", c_void_p),
        ("text_weights", c_void_p),
        ("image_masses", c_void_p),
        ("text_masses", c_void_p),
        ("teacher", c_void_p),
        ("teacher_scale", c_void_p),
        ("teacher_bias", c_void_p),
        ("teacher_stride", c_int64),
        ("dz_stride", c_int64),
        ("rows", c_int32),
        ("cols", c_int32),
        ("features", c_int32),
        ("offset", c_int32),
        ("ignore_ids", c_int32),
        ("soft_targets", c_int32),
        ("positive_weight", c_float),
        ("label_smoothing", c_float),
        ("teacher_weight", c_float),
    )


def num_partials(R: int, C: int) -> int:
    """Sums of each kind in a block of R images and C texts."""
    return PARTIALS * -(-R // TILE) * -(-C // TILE)


def options(compilation: Compilation) -> list[str]:
    """NVRTC's options."""
    defines = {
        "ELEMENT": {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}[compilation.dtype],
        "PAIRS": compilation.pairs,
        "OUTPUT": compilation.output,
        "TILE": TILE,
        "PARTIALS": PARTIALS,
        "THREADS": THREADS,
        "SHARED_BYTES": SHARED_BYTES,
        "PARAMS_BYTES": ctypes.sizeof(BlockParams),
    }
    return ["-std=c++17", "-arch=sm_90a", *(f"-DSIGLIP_{name}={value}" for name, value in defines.items())]


def machine_code(compilation: Compilation) -> bytes:
    """The compiled kernel, from a cache or by NVRTC; CompileError."""
    name = cache.digest(repr((nvrtc.version(), options(compilation), _sources())).encode())
    folders = [root / "cuda" for root in cache.roots([], make=True)]
    for folder in folders:
        for path in cache.intact(folder, name, ".cubin"):
            with suppress(OSError):
                return path.read_bytes()
    code = nvrtc.compile_file(SOURCE, options(compilation))
    for folder in folders:
        with suppress(OSError):  # no folder is needed, it only saves the next process the time
            folder.mkdir(parents=True, exist_ok=True)
            with cache.private_folder(folder) as private:
                (private / f"{name}.cubin").write_bytes(code)
                cache.store(private / f"{name}.cubin", folder)
            break
    return code


@functools.cache
def load_kernel(compilation: Compilation, device: int) -> c_void_p:
    """The kernel on a device."""
    return driver.load_kernel(machine_code(compilation), NAME, SHARED_BYTES, device)


def launch(
    compilation: Compilation, task: BlockTask, x: Tensor, y: Tensor, partials: Tensor, stats: Tensor | None
) -> None:
    """Launch on the current stream. x, y: the task's features in the compilation's dtype, rows aligned to 16 bytes."""
    pairs, dz, device = task.pairs, task.dz, x.get_device()
    (R, D), C = x.shape, y.shape[0]
    dtype, writes_dz = compilation.dtype, compilation.output == "kDz"
    params = BlockParams(
        partials=partials.data_ptr(),
        scale=task.scale.data_ptr(),
        bias=task.bias.data_ptr(),
        dz_scale=address(task.dz_scale),
        dz_stride=0 if dz is None else dz.stride(0),
        rows=R,
        cols=C,
        features=D,
        offset=pairs.offset_within(R, C),
    )
    if compilation.pairs != "kOffset":  # which reads no more
        params.stats, params.float32_dz = address(stats), address(None if writes_dz else dz)
        params.image_ids, params.text_ids = address(pairs.image_ids), address(pairs.text_ids)
        params.image_weights, params.text_weights = address(pairs.image_weights), address(pairs.text_weights)
        params.image_masses, params.text_masses = address(pairs.image_masses), address(pairs.text_masses)
        params.ignore_ids, params.soft_targets = pairs.ignore_ids, pairs.multi_positive == "soft_targets"
        params.positive_weight, params.label_smoothing = pairs.positive_weight, pairs.label_smoothing
        if (teacher := task.teacher) is not None:
            params.teacher, params.teacher_stride = teacher.products.data_ptr(), teacher.products.stride(0)
            params.teacher_scale, params.teacher_bias = teacher.scale.data_ptr(), teacher.bias.data_ptr()
            params.teacher_weight = teacher.weight
    box = TILE, BOX_COLUMNS
    x_map = driver.tensor_map(dtype, x.data_ptr(), R, D, x.stride(0), box)
    y_map = driver.tensor_map(dtype, y.data_ptr(), C, D, y.stride(0), box)
    dz_map = x_map  # not read
    if dz is not None and writes_dz:
        dz_map = driver.tensor_map(dtype, dz.data_ptr(), R, C, dz.stride(0), box)
    blocks = min(_multiprocessors(device), partials.shape[1] // PARTIALS)  # no more than there are tiles
    arguments = params, x_map, y_map, dz_map
    stream = torch._C._cuda_getCurrentRawStream(device)
    driver.launch(load_kernel(compilation, device), blocks, THREADS, SHARED_BYTES, arguments, device, stream)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _sources() -> list[tuple[str, str]]:
    return [(path.name, path.read_text()) for path in sorted(SOURCE.parent.glob("*.*")) if path.is_file()]
