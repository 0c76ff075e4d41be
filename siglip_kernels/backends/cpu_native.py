"""The ctypes bindings of the shared library of csrc/cpu/: its functions and structures."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, Structure, c_char, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build, targets

# Instruction sets; each contains those before it. An index here is a value of IsaLevel in csrc/cpu/cpu_info.h.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype in csrc/cpu/params.h


class BlockParams(Structure):
    """``BlockParams`` of csrc/cpu/params.h."""

    _fields_ = (
        ("rows", c_int64),
        ("cols", c_int64),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("dz_scale", c_void_p),
        ("offset", c_int64),
        ("image_ids", c_void_p),
        ("text_ids", c_void_p),
        ("image_weights", c_void_p),
        ("text_weights", c_void_p),
        ("dz", c_void_p),
        ("dz_stride", c_int64),
        ("sums", c_void_p),
        ("logits", c_int32),
        ("operand", c_int32),
        ("loss_only", c_int32),
        ("ignore_ids", c_int32),
        ("soft_targets", c_int32),
        ("image_masses", c_void_p),
        ("text_masses", c_void_p),
        ("has_balance", c_int32),
        ("positive_weight", c_double),
        ("label_smoothing", c_double),
        ("teacher", c_void_p),
        ("teacher_stride", c_int64),
        ("teacher_scale", c_void_p),
        ("teacher_bias", c_void_p),
        ("teacher_weight", c_double),
        ("image_losses", c_void_p),
        ("stats", c_void_p),
        ("dx", c_void_p),
        ("dy", c_void_p),
        ("dx_begun", c_int32),
        ("dy_begun", c_int32),
    )


class _Machine(Structure):
    """``CpuInfo`` of csrc/cpu/cpu_info.h."""

    _fields_ = (
        ("vendor", c_char * 16),
        ("family", c_int32),
        ("model", c_int32),
        ("level", c_int32),
        ("float16_products", c_int32),
    )


class Machine(NamedTuple):
    """What the CPU reports about itself, and what torch provides for it."""

    vendor: str  # of CPUID: "AuthenticAMD", "GenuineIntel", …; empty if there is none
    family: int
    model: int
    level: int  # index in LEVELS
    float16_products: bool  # the CPU has instructions for them
    mkl: frozenset[torch.dtype]  # operand dtypes of MKL's exported GEMMs into float32 (for float64: into float64)


class CpuLibrary:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        libtorch = _libtorch()
        parallel_for = getattr(libtorch, "torch_parallel_for", None)
        self.pool = None if parallel_for is None else ctypes.cast(parallel_for, c_void_p)
        self.gemm = _gemm(libtorch)
        self.machine = _this_machine(library, frozenset(self.gemm))
        self.level = self.machine.level
        params = POINTER(BlockParams)
        self.epilogue = _function(library, "siglip_epilogue", params, c_void_p, c_int64, c_int32, c_void_p)
        self.evaluate = _function(library, "siglip_evaluate", *[c_int32] * 3, c_void_p, c_void_p, c_int64)
        features = (c_void_p, c_void_p, c_int64)
        self.block_by_blas = _function(
            library, "siglip_block_by_blas", params, *features, c_void_p, c_int64, c_void_p, c_int32, c_void_p
        )
        products = (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p)
        self.inner_products_by_blas = _function(library, "siglip_inner_products_by_blas", *products)
        if hasattr(library, "siglip_block"):
            self.block = _function(library, "siglip_block", params, *features, c_void_p, c_void_p)
            self.inner_products = _function(library, "siglip_inner_products", *products, c_void_p)


def _this_machine(library: ctypes.CDLL, mkl: frozenset[torch.dtype]) -> Machine:
    machine = _Machine()
    _function(library, "siglip_machine", POINTER(_Machine))(ctypes.byref(machine))
    vendor = machine.vendor.decode("ascii", "replace")
    return Machine(vendor, machine.family, machine.model, machine.level, bool(machine.float16_products), mkl)


def _gemm(libtorch: ctypes.CDLL) -> dict[torch.dtype, c_void_p]:
    """MKL's GEMMs by operand dtype. torch exports them on x86, as symbols that are not API."""
    names = {
        torch.float32: "sgemm_",
        torch.float64: "dgemm_",
        torch.bfloat16: "cblas_gemm_bf16bf16f32",
        torch.float16: "cblas_gemm_f16f16f32",
    }
    has_mkl = torch.backends.mkl.is_available()  # another BLAS has some of these names, and unknown threads
    return {
        dtype: ctypes.cast(getattr(libtorch, name), c_void_p)
        for dtype, name in names.items()
        if has_mkl and hasattr(libtorch, name)
    }


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return function


def _libtorch() -> ctypes.CDLL:
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))


@functools.cache
def load() -> CpuLibrary | str:
    """The library, compiled if it is not yet; or the reason why there is none."""
    try:
        return CpuLibrary(build.load(targets.TARGETS["cpu"]))
    except (build.BuildError, OSError, AttributeError) as error:
        return str(error)


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
