"""The block kernel in C++ for CPUs: library products, and one vectorised pass for all that is elementwise.

bfloat16 products into float32, which torch has none of on the CPU, are MKL's where there is AMX, and ours by AVX-512's
dot products elsewhere: there the logits of a block never leave the cache. Everything else is widened to float32.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siglip_kernels import build, products
from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.pairs import PairSpec

# Best first: its bit in siglip_features(), and the level that its epilogue was compiled for.
LEVELS = {"amx": (8, "avx512"), "avx512_bf16": (4, "avx512"), "avx512": (2, "avx512"), "avx2": (1, "avx2")}
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
LABELS = {"none": 0, "offset": 1, "ids": 2}


def _structure(*fields: str) -> type[ctypes.Structure]:
    """A C structure of 64-bit integers and pointers; the latter's names begin with a star."""
    kinds = [(f.lstrip("*"), ctypes.c_void_p if f.startswith("*") else ctypes.c_int64) for f in fields]
    return type("Structure", (ctypes.Structure,), {"_fields_": kinds})


# As in csrc/cpu/api.h.
_Block = _structure(
    *("r", "c", "*u", "ldu", "*dz", "lddz", "dz_element", "*scale", "*bias", "labels", "offset", "*image_ids"),
    *("*text_ids", "*image_weights", "*text_weights", "loss_only", "*sums", "*parallel_for"),
)
_Product = _structure(
    *("m", "n", "k", "*a", "a_row", "a_col", "*b", "b_row", "b_col", "*out", "ldo", "accumulate", "*parallel_for")
)


class Native:
    """The built library, and those symbols of torch's own that it works with."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        # Already loaded by torch; its own thread pool, and MKL's products where it was linked.
        self.torch = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        self.parallel_for = ctypes.cast(self.torch.torch_parallel_for, ctypes.c_void_p)
        self.library.siglip_features.restype = ctypes.c_int64
        features = self.library.siglip_features()
        self.levels = [name for name, (bit, _) in LEVELS.items() if features & bit] + ["portable"]
        self.mkl = getattr(self.torch, "cblas_gemm_bf16bf16f32", None)
        if self.mkl is None and "amx" in self.levels:
            self.levels.remove("amx")

    def epilogue(self, level: str) -> Any:
        return getattr(self.library, f"siglip_epilogue_{LEVELS[level][1] if level in LEVELS else 'portable'}")


@functools.cache
def native() -> Native | str:
    """The library, built if need be, or why there is none."""
    try:
        return Native(build.library(build.TARGETS["cpu"]))
    except (build.BuildError, OSError, StopIteration, AttributeError) as error:
        return str(error)


class CpuBlockKernel(BlockKernel):
    """``level``: an instruction set of LEVELS, or "portable"; None: the best that is here."""

    name = "cpu"

    def __init__(self, level: str | None = None) -> None:
        self.asked = level

    def why_not(self, problem: Problem) -> list[str]:
        if problem.device.type != "cpu":
            return [f"features are on {problem.device.type}, expected the CPU"]
        # What the first call has found out, or what is known without compiling.
        return self.prepare() if native.cache_info().currsize else build.why_not(build.TARGETS["cpu"])

    def prepare(self) -> list[str]:
        found = native()
        if isinstance(found, str):
            return [found]
        if self.asked not in (None, *found.levels):
            return [f"level {self.asked!r} is not among this processor's: {', '.join(found.levels)}"]
        return []

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        if problem.dtype is torch.bfloat16 and problem.rounds_out and self._level in ("amx", "avx512_bf16"):
            return torch.bfloat16
        return torch.float32 if problem.dtype in (torch.bfloat16, torch.float16) else problem.dtype

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        return 1024, 1024

    def workspace(self, problem: Problem, R: int, C: int) -> Tensor:
        """[R, C] inner products, where neither a fused product nor dz has room for them."""
        operand = self.operand_dtype(problem)
        in_dz = problem.needs_dz and operand is not torch.bfloat16
        elements = 0 if in_dz or self._fuses(operand) else R * C
        return torch.empty(elements, dtype=torch.float64 if operand is torch.float64 else torch.float32)

    def block(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        pairs: PairSpec,
        *,
        sums: Tensor,
        dz: Tensor | None,
        dz_scale: Tensor | None,
        workspace: Tensor,
        loss_only: bool = False,
    ) -> None:
        r, c = x.shape[0], y.shape[0]
        code = self._native
        labels = "ids" if pairs.has_ids else "offset" if pairs.may_have_positives(r, c) else "none"
        kept = [None if t is None else t.to(torch.int64) for t in (pairs.image_ids, pairs.text_ids)]
        arguments = _Block(
            r=r,
            c=c,
            dz=_pointer(dz),
            lddz=0 if dz is None else dz.stride(0),
            dz_element=ELEMENTS[x.dtype],
            scale=_pointer(scale),
            bias=_pointer(bias),
            labels=LABELS[labels],
            offset=pairs.positive_offset or 0,
            image_ids=_pointer(kept[0]),
            text_ids=_pointer(kept[1]),
            image_weights=_pointer(pairs.image_weights),
            text_weights=_pointer(pairs.text_weights),
            loss_only=loss_only,
            sums=_pointer(sums),
            parallel_for=code.parallel_for,
        )
        if self._fuses(x.dtype):
            product = self._product(None, x, y.T, accumulate=False)
            code.library.siglip_block_bf16(ctypes.byref(arguments), ctypes.byref(product))
            return
        # Each vector of u is read before dz takes its place.
        u = workspace[: r * c].view(r, c) if workspace.numel() or dz is None else dz
        self.matmul_(u, x, y.T)
        arguments.u, arguments.ldu = _pointer(u), u.stride(0)
        self._epilogue(ctypes.byref(arguments))

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> None:
        if a.dtype is not torch.bfloat16:
            products.matmul_(out, a, b, accumulate=accumulate)
        elif self._level == "amx":
            _mkl_product(self._native.mkl, out, a, b, accumulate)
        else:
            product = self._product(out, a, b, accumulate)
            self._native.library.siglip_product_bf16(ctypes.byref(product))

    def _product(self, out: Tensor | None, a: Tensor, b: Tensor, accumulate: bool) -> ctypes.Structure:
        return _Product(
            m=a.shape[0],
            n=b.shape[1],
            k=a.shape[1],
            a=_pointer(a),
            a_row=a.stride(0),
            a_col=a.stride(1),
            b=_pointer(b),
            b_row=b.stride(0),
            b_col=b.stride(1),
            out=_pointer(out),
            ldo=0 if out is None else out.stride(0),
            accumulate=accumulate,
            parallel_for=self._native.parallel_for,
        )

    def _fuses(self, operand: torch.dtype) -> bool:
        """Whether product and epilogue are one call."""
        return operand is torch.bfloat16 and self._level == "avx512_bf16"

    @functools.cached_property
    def _native(self) -> Native:
        found = native()
        assert isinstance(found, Native), found  # why_not has seen to it
        return found

    @functools.cached_property
    def _level(self) -> str:
        return self.asked or self._native.levels[0]

    @functools.cached_property
    def _epilogue(self) -> Callable[[Any], None]:
        return self._native.epilogue(self._level)


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112  # of cblas


def _mkl_product(mkl: Any, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = or += a @ b by MKL, bfloat16 into float32."""
    m, n, k = a.shape[0], b.shape[1], a.shape[1]
    sides = [(_NO_TRANSPOSE, t.stride(0)) if t.stride(1) == 1 else (_TRANSPOSE, t.stride(1)) for t in (a, b)]
    (ta, lda), (tb, ldb) = [(kind, ctypes.c_int(max(stride, 1))) for kind, stride in sides]
    one, beta = ctypes.c_float(1), ctypes.c_float(accumulate)
    left, right, result = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, out))
    mkl(_ROW_MAJOR, ta, tb, m, n, k, one, left, lda, right, ldb, beta, result, ctypes.c_int(out.stride(0)))
