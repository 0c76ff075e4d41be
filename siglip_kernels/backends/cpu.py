"""The block kernel in C++ on CPU tensors: csrc/cpu/, compiled on first use.

The products by level: bfloat16 by MKL where the machine has AMX, by our own kernel where it has AVX512-BF16; float16 by
MKL where the machine multiplies it. Any other half precision is widened to float32, and that is multiplied by our own
kernel where the machine has AVX-512 but no AMX, else by torch. float64 is torch's.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build
from siglip_kernels.backends.base import BlockKernel, Gradients, Problem
from siglip_kernels.backends.cpu_native import DTYPES, LEVELS, Block, Native, address, load
from siglip_kernels.pairs import PairSpec
from siglip_kernels.products import matmul_

AVX512, AVX512_BF16, AMX = (LEVELS.index(name) for name in ("avx512", "avx512_bf16", "amx"))
PANEL = 64  # kPanel of csrc/cpu/product.h


class Workspace(NamedTuple):
    u: Tensor | None  # [R·C] inner products, in the logits' dtype; None where dz has room for them, or a tile does
    packed: Tensor | None  # int32: panels of our own products' operands


class CpuBlockKernel(BlockKernel):
    """One vectorised pass over inner products that are still in the cache."""

    name = "cpu"

    def __init__(self, level: str | None = None) -> None:
        """``level``: of LEVELS, to test a lower one than the machine's; None: the machine's."""
        self._level = level
        self._chosen: dict[torch.dtype, str] = {}

    def why_not(self, problem: Problem) -> list[str]:
        if problem.device.type != "cpu":
            return [f"features are on {problem.device.type}, expected the CPU"]
        # What the first call has found out, or what is known without compiling.
        return self.prepare() if load.cache_info().currsize else build.why_not(build.TARGETS["cpu"])

    def prepare(self) -> list[str]:
        native = load()
        if isinstance(native, str):
            return [native]
        if self._level is not None and LEVELS.index(self._level) > native.level:
            return [f"this CPU's level is {LEVELS[native.level]}, below {self._level}"]
        return []

    @functools.cached_property
    def _native(self) -> Native:
        native = load()
        if isinstance(native, str):
            raise RuntimeError(native)
        return native

    def _products(self, dtype: torch.dtype) -> str:
        """Whose products multiply features of ``dtype``: "ours", "mkl", or "torch" after widening half precision."""
        if dtype not in self._chosen:
            self._chosen[dtype] = self._choose_products(dtype)
        return self._chosen[dtype]

    def _choose_products(self, dtype: torch.dtype) -> str:
        native = self._native
        level = native.level if self._level is None else LEVELS.index(self._level)
        if dtype is torch.bfloat16 and level >= AMX and dtype in native.gemm:
            return "mkl"
        # Not float32 where there is AMX: those are Intel's machines, MKL is at its best there, and ours was not tried.
        if (dtype is torch.float32 and AVX512 <= level < AMX) or (dtype is torch.bfloat16 and level >= AVX512_BF16):
            return "ours"
        if dtype is torch.float16 and self._level is None and native.has_float16_products and dtype in native.gemm:
            return "mkl"
        return "torch"

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        if problem.dtype is torch.float64:
            return torch.float64
        return torch.float32 if not problem.rounds_out or self._products(problem.dtype) == "torch" else problem.dtype

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        """Larger blocks read and write the float32 accumulators less often; smaller ones keep dz in the cache."""
        operand = self.operand_dtype(problem)
        ours = self._products(operand) == "ours"
        # Widened features are a part of the workspace too.
        R, C = 2048 if ours else 1024, 2048 if ours and operand is problem.dtype else 1024
        return _even_cut(problem.M, R), _even_cut(problem.N, C)

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        dtype = self.operand_dtype(problem)
        products = self._products(dtype)
        if products == "ours":
            return Workspace(None, torch.empty(_packed_words(R, C, problem.D, dtype), dtype=torch.int32))
        in_dz = problem.needs_dz and products == "torch"
        return Workspace(None if in_dz else torch.empty(R * C, dtype=_logits_dtype(dtype)), None)

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
        workspace: Workspace,
        loss_only: bool = False,
        stats: Tensor | None = None,
    ) -> None:
        described = _described(x, y, scale, bias, pairs, sums, dz, dz_scale, loss_only, stats)
        native, products = self._native, self._products(x.dtype)
        if products == "ours":
            self._run(described, x, y, workspace)
            return
        r, c = x.shape[0], y.shape[0]
        u = dz if workspace.u is None else workspace.u[: r * c].view(r, c)
        assert u is not None
        multiply = native.matmul_ if products == "mkl" else matmul_
        multiply(u, x, y.T)
        level = native.level if self._level is None else LEVELS.index(self._level)
        native.epilogue(ctypes.byref(described), u.data_ptr(), u.stride(0), level, native.pool)

    def step(self, x: Tensor, y: Tensor, *logits: Any, gradients: Gradients, workspace: Workspace, **out: Any) -> None:
        if self._products(x.dtype) != "ours":
            super().step(x, y, *logits, gradients=gradients, workspace=workspace, **out)
            return
        described = _described(x, y, *logits, **out)
        dx, described.dx_begun, dy, described.dy_begun = gradients
        described.dx, described.dy = address(dx), address(dy)
        self._run(described, x, y, workspace)

    def _run(self, block: Block, x: Tensor, y: Tensor, workspace: Workspace) -> None:
        """By our own products."""
        native = self._native
        pointers = x.data_ptr(), y.data_ptr(), x.shape[1], address(workspace.packed)
        native.block(ctypes.byref(block), *pointers, native.pool)

    def matmul_(self, out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, workspace: Workspace) -> None:
        multiply = self._native.matmul_ if self._products(a.dtype) == "mkl" else matmul_
        multiply(out, a, b, accumulate=accumulate)


def _described(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: PairSpec,
    sums: Tensor,
    dz: Tensor | None,
    dz_scale: Tensor | None,
    loss_only: bool = False,
    stats: Tensor | None = None,
) -> Block:
    """What ``BlockKernel.block`` is asked for, as the library takes it."""
    r, c = x.shape[0], y.shape[0]
    block = Block(
        r,
        c,
        scale.data_ptr(),
        bias.data_ptr(),
        address(dz_scale),
        pairs.offset_within(r, c),
        address(pairs.image_ids),
        address(pairs.text_ids),
        address(pairs.image_weights),
        address(pairs.text_weights),
        address(dz),
        0 if dz is None else dz.stride(0),
        sums.data_ptr(),
        DTYPES[scale.dtype],
        DTYPES[x.dtype],
        loss_only,
    )
    if pairs.ignore_ids or pairs.multi_positive is not None or stats is not None:
        block.ignore_ids, block.soft_targets = pairs.ignore_ids, pairs.multi_positive == "soft_targets"
        block.image_masses, block.text_masses = address(pairs.image_masses), address(pairs.text_masses)
        block.stats = address(stats)
    return block


def _even_cut(length: int, most: int) -> int:
    """The size of a block when ``length`` is cut evenly, on multiples of PANEL, into blocks of at most ``most``."""
    return most if length <= most else -(-length // (-(-length // most) * PANEL)) * PANEL


def _logits_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand is torch.float64 else torch.float32


def _packed_words(R: int, C: int, D: int, dtype: torch.dtype) -> int:
    """Of the largest pack: y transposed, y with nothing beside it, x with dzᵀ beside it."""
    in_word = 4 // dtype.itemsize
    r, c, d = -(-R // in_word), -(-C // in_word), -(-D // in_word)
    C, D = -(-C // PANEL) * PANEL, -(-D // PANEL) * PANEL
    return max(d * C, c * D, r * (D + C))
