"""The block kernel in C++ on CPU tensors: csrc/cpu/, compiled on first use.

Whose products multiply the features, ours or those of torch's BLAS, and whether half precision is widened to float32
first, is chosen by ``products`` from what the CPU says of itself.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build
from siglip_kernels.backends.base import BlockKernel, Gradients, Problem
from siglip_kernels.backends.cpu_native import DTYPES, LEVELS, Block, Machine, Native, address, load
from siglip_kernels.pairs import PairSpec
from siglip_kernels.products import matmul_

AVX512, AVX512_BF16, AMX = (LEVELS.index(name) for name in ("avx512", "avx512_bf16", "amx"))
PANEL = 64  # kNR of csrc/cpu/gemm.h


def products(machine: Machine, dtype: torch.dtype) -> str:
    """Whose products multiply features of ``dtype``: "ours", torch's "blas", or those of float32, once "widened" to it.

    What is there need not be fast (figures: bench/NOTES.md). On AMD ours win in both dtypes. On Intel MKL wins in
    float32, and AVX512-BF16 loses to that: only AMX makes bfloat16 the faster dtype. MKL goes by the vendor too: where
    that is unknown, as in a virtual machine that masks it, ours are taken.
    """
    level, is_intel, has_mkl = machine.level, machine.vendor == "GenuineIntel", dtype in machine.mkl
    if dtype is torch.bfloat16 and level >= AMX and has_mkl:
        return "blas"
    if dtype is torch.bfloat16:
        return "ours" if level >= AVX512_BF16 and not is_intel else "widened"
    if dtype is torch.float16:
        return "blas" if machine.float16_products and has_mkl else "widened"
    # AMX is Intel's, whatever the vendor says.
    ours = dtype is torch.float32 and AVX512 <= level < AMX and not (is_intel and has_mkl)
    return "ours" if ours else "blas"


class Workspace(NamedTuple):
    u: Tensor | None  # [R·C] inner products, in the logits' dtype; None where dz has room for them, or a tile does
    packed: Tensor | None  # int32: panels of our own products' operands


class CpuBlockKernel(BlockKernel):
    """One vectorised pass over inner products that are still in the cache."""

    name = "cpu"

    def __init__(self, level: str | None = None) -> None:
        """``level``: of LEVELS, to test a lower one than the machine's; None: the machine's."""
        self._level = level

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

    @functools.cached_property
    def _machine(self) -> Machine:
        machine = self._native.machine
        if self._level is None:
            return machine
        # A level under test is nobody's machine.
        return machine._replace(vendor="", level=LEVELS.index(self._level), float16_products=False)

    @functools.cached_property
    def _chosen(self) -> dict[torch.dtype, str]:
        return {dtype: products(self._machine, dtype) for dtype in DTYPES}

    def _products(self, dtype: torch.dtype) -> str:
        return self._chosen[dtype]

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        if problem.dtype is torch.float64:
            return torch.float64
        return torch.float32 if not problem.rounds_out or self._products(problem.dtype) == "widened" else problem.dtype

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        """Larger blocks read and write the float32 accumulators less often; smaller ones keep dz in the cache."""
        operand = self.operand_dtype(problem)
        ours = self._products(operand) == "ours"
        # Widened features are a part of the workspace too.
        R, C = 2048 if ours else 1024, 2048 if ours and operand is problem.dtype else 1024
        return _even_cut(problem.M, R), _even_cut(problem.N, C)

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        dtype = self.operand_dtype(problem)
        if self._products(dtype) == "ours":
            words = _packed_words(R, C, problem.D, dtype)
            return Workspace(None, torch.empty(words, dtype=torch.int32, device="cpu"))
        logits = _logits_dtype(dtype)
        in_dz = problem.needs_dz and dtype is logits
        return Workspace(None if in_dz else torch.empty(R * C, dtype=logits, device="cpu"), None)

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
        described = _described(
            x, y, scale, bias, pairs, sums=sums, dz=dz, dz_scale=dz_scale, loss_only=loss_only, stats=stats
        )
        self._run(described, x, y, dz, workspace, self._gemm(x.dtype))

    def step(
        self,
        x: Tensor,
        y: Tensor,
        *logits: Any,
        gradients: Gradients,
        dz: Tensor | None,
        workspace: Workspace,
        **out: Any,
    ) -> None:
        gemm = self._gemm(x.dtype)
        if gemm is None and workspace.packed is None:
            super().step(x, y, *logits, gradients=gradients, dz=dz, workspace=workspace, **out)
            return
        described = _described(x, y, *logits, dz=dz, **out)
        dx, described.dx_begun, dy, described.dy_begun = gradients
        described.dx, described.dy = address(dx), address(dy)
        self._run(described, x, y, dz, workspace, gemm)

    def _gemm(self, dtype: torch.dtype) -> ctypes.c_void_p | None:
        """MKL's, for calls that go past torch and its overhead; None: the products are ours, or torch's to choose."""
        if self._products(dtype) == "ours":
            return None
        # What less than float32 the user allows is for torch.mm to make use of.
        allowed = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        return None if dtype is torch.float32 and allowed in ("bf16", "tf32") else self._native.gemm.get(dtype)

    def _run(
        self,
        block: Block,
        x: Tensor,
        y: Tensor,
        dz: Tensor | None,
        workspace: Workspace,
        gemm: ctypes.c_void_p | None,
    ) -> None:
        native, features = self._native, (x.data_ptr(), y.data_ptr(), x.shape[1])
        if workspace.packed is not None:
            native.block(ctypes.byref(block), *features, workspace.packed.data_ptr(), native.pool)
            return
        u = dz if workspace.u is None else workspace.u[: x.shape[0] * y.shape[0]].view(x.shape[0], y.shape[0])
        assert u is not None
        room = u.data_ptr(), u.stride(0)
        if gemm is not None:
            native.block_by_blas(ctypes.byref(block), *features, *room, gemm, self._machine.level, native.pool)
            return
        matmul_(u, x, y.T)  # and the gradients by step
        native.epilogue(ctypes.byref(block), *room, self._machine.level, native.pool)


def _described(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: PairSpec,
    *,
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
