"""The shared library of csrc/cpu/ as Python sees it: its functions and structures, through ctypes."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_kernels import build

# Each contains those before it; the numbers of Level in csrc/cpu/machine.h.
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # Dtype in csrc/cpu/block.h


class Block(Structure):
    """Of csrc/cpu/block.h."""

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
        ("stats", c_void_p),
        ("dx", c_void_p),
        ("dy", c_void_p),
        ("dx_begun", c_int32),
        ("dy_begun", c_int32),
    )


class Native:
    """The library, loaded."""

    def __init__(self, path: Path) -> None:
        library, libtorch = ctypes.CDLL(str(path)), _libtorch()
        parallel_for = getattr(libtorch, "torch_parallel_for", None)
        self.pool = None if parallel_for is None else ctypes.cast(parallel_for, c_void_p)
        self.level = int(library.siglip_level())
        self.has_float16_products = bool(library.siglip_has_float16_products())
        self.epilogue = _function(library, "siglip_epilogue", POINTER(Block), c_void_p, c_int64, c_int32, c_void_p)
        self.evaluate = _function(library, "siglip_evaluate", *[c_int32] * 3, c_void_p, c_void_p, c_int64)
        if hasattr(library, "siglip_block"):
            features = (c_void_p, c_void_p, c_int64)
            self.block = _function(library, "siglip_block", POINTER(Block), *features, c_void_p, c_void_p)
        # MKL's, which torch exports on x86: symbols, not API.
        self.gemm = {
            dtype: _function(libtorch, name, *_GEMM)
            for dtype, name in (
                (torch.bfloat16, "cblas_gemm_bf16bf16f32"),
                (torch.float16, "cblas_gemm_f16f16f32"),
            )
            if hasattr(libtorch, name)
        }

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        """``out = a @ b``, or ``out += a @ b``, by MKL: a, b half precision and either way round, out float32."""
        (m, k), n = a.shape, b.shape[1]
        trans_a, lda = _layout(a)
        trans_b, ldb = _layout(b)
        self.gemm[a.dtype](
            *(101, trans_a, trans_b, m, n, k, 1.0, a.data_ptr(), lda, b.data_ptr(), ldb),
            *(float(accumulate), out.data_ptr(), out.stride(0)),
        )


_GEMM = (*[c_int32] * 6, ctypes.c_float, c_void_p, c_int32, c_void_p, c_int32, ctypes.c_float, c_void_p, c_int32)


def _layout(t: Tensor) -> tuple[int, int]:
    """CblasNoTrans or CblasTrans, and the leading dimension."""
    return (111, max(t.stride(0), t.shape[1])) if t.stride(1) == 1 else (112, max(t.stride(1), t.shape[0]))


def _function(library: ctypes.CDLL, name: str, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, None
    return function


def _libtorch() -> ctypes.CDLL:
    suffix = "dylib" if platform.system() == "Darwin" else "so"
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))


@functools.cache
def load() -> Native | str:
    """The library, compiled where it is not yet; or the reason why there is none."""
    try:
        return Native(build.library(build.TARGETS["cpu"]))
    except (build.BuildError, OSError, AttributeError) as error:
        return str(error)


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
