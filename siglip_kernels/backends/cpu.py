"""The block kernel in C++ for CPU tensors: csrc/cpu/, compiled on first use.

``choose_gemm`` chooses the GEMM, ours or that of torch's BLAS, by what the CPU reports about itself. It also decides
whether half precision is widened to float32 first.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels import build, targets
from siglip_kernels.backends.base import BlockKernel, BlockTask, Problem
from siglip_kernels.backends.cpu_native import DTYPES, LEVELS, BlockParams, CpuLibrary, Machine, address, load
from siglip_kernels.gemm import gemm_

AVX512, AVX512_BF16, AMX = (LEVELS.index(name) for name in ("avx512", "avx512_bf16", "amx"))
PANEL = 64  # kNR of csrc/cpu/gemm.h
TILE_COLUMNS = 256  # kTileColumns of csrc/cpu/params.h


def choose_gemm(machine: Machine, dtype: torch.dtype) -> str:
    """Which GEMM multiplies features of ``dtype``: "ours", torch's "blas", or float32's after they are "widened" to it.

    Instructions that a CPU has need not be fast: docs/measured-facts.md has the figures. On AMD ours wins in both
    dtypes. On Intel MKL wins in float32, and AVX512-BF16 is slower than that: only AMX makes bfloat16 the faster dtype.
    MKL's speed also depends on the vendor. Where that is unknown, as in a virtual machine that masks it, ours is taken.
    """
    level, is_intel, has_mkl = machine.level, machine.vendor == "GenuineIntel", dtype in machine.mkl
    if dtype is torch.bfloat16 and level >= AMX and has_mkl:
        return "blas"
    if dtype is torch.bfloat16:
        return "ours" if level >= AVX512_BF16 and not is_intel else "widened"
    if dtype is torch.float16:
        return "blas" if machine.float16_products and has_mkl else "widened"
    # Only Intel has AMX, whatever the vendor string says.
    ours = dtype is torch.float32 and AVX512 <= level < AMX and not (is_intel and has_mkl)
    return "ours" if ours else "blas"


class Workspace(NamedTuple):
    u: Tensor | None  # [R·C] inner products, in the logits' dtype; None if dz or a tile holds them
    packed: Tensor | None  # int32: packed panels of our own GEMM's operands


class CpuBlockKernel(BlockKernel):
    """One vectorised pass over inner products that are still in the cache."""

    name = "cpu"

    def __init__(self, level: str | None = None) -> None:
        """``level``: one of LEVELS, to test a lower one than the machine's. None: the machine's."""
        self._level = level

    def why_not(self, problem: Problem) -> list[str]:
        if problem.device.type != "cpu":
            return [f"features are on {problem.device.type}, expected the CPU"]
        # The result of the first load; before it, what is known without compiling.
        return self.prepare() if load.cache_info().currsize else build.why_not(targets.TARGETS["cpu"])

    def prepare(self) -> list[str]:
        native = load()
        if isinstance(native, str):
            return [native]
        if self._level is not None and LEVELS.index(self._level) > native.level:
            return [f"this CPU's level is {LEVELS[native.level]}, below {self._level}"]
        return []

    @functools.cached_property
    def _native(self) -> CpuLibrary:
        native = load()
        if isinstance(native, str):
            raise RuntimeError(native)
        return native

    @functools.cached_property
    def _machine(self) -> Machine:
        machine = self._native.machine
        if self._level is None:
            return machine
        # A level under test belongs to no vendor.
        return machine._replace(vendor="", level=LEVELS.index(self._level), float16_products=False)

    @functools.cached_property
    def _chosen(self) -> dict[torch.dtype, str]:
        return {dtype: choose_gemm(self._machine, dtype) for dtype in DTYPES}

    def _gemm(self, dtype: torch.dtype) -> str:
        return self._chosen[dtype]

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        if problem.dtype is torch.float64:
            return torch.float64
        return torch.float32 if not problem.rounds_out or self._gemm(problem.dtype) == "widened" else problem.dtype

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        """Larger blocks read and write the float32 accumulators less often; smaller ones keep dz in the cache."""
        operand = self.operand_dtype(problem)
        ours = self._gemm(operand) == "ours"
        # Widened copies of the features take memory too, so their blocks are smaller.
        R, C = 2048 if ours else 1024, 2048 if ours and operand is problem.dtype else 1024
        return _even_cut(problem.M, R), _even_cut(problem.N, C)

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        dtype = self.operand_dtype(problem)
        if self._gemm(dtype) == "ours":
            words = _packed_words(R, C, problem.D, dtype)
            if problem.teacher_width:
                words = max(words, _packed_words(R, C, problem.teacher_width, dtype, logits_alone=True))
            return Workspace(None, torch.empty(words, dtype=torch.int32, device=problem.device))
        logits = _logits_dtype(dtype)
        in_dz = problem.needs_dz and dtype is logits
        return Workspace(None if in_dz else torch.empty(R * C, dtype=logits, device=problem.device), None)

    def block(self, task: BlockTask) -> None:
        block, losses = _block_params(task), None
        if task.image_losses is not None:
            losses = task.sums.new_zeros(-(-len(task.y) // TILE_COLUMNS), len(task.x))
            block.image_losses = losses.data_ptr()
        self._run(task, block, self._mkl_gemm(task.x.dtype))
        if losses is not None:
            torch.sum(losses, dim=0, out=task.image_losses)

    def block_and_grads(self, task: BlockTask) -> None:
        gemm = self._mkl_gemm(task.x.dtype)
        if task.image_losses is not None or (gemm is None and task.workspace.packed is None):
            super().block_and_grads(task)
            return
        block = _block_params(task)
        block.dx, block.dx_begun = address(task.dx), task.accumulate_dx
        block.dy, block.dy_begun = address(task.dy), task.accumulate_dy
        self._run(task, block, gemm)

    def inner_products(self, out: Tensor, x: Tensor, y: Tensor, workspace: Workspace) -> None:
        if out.dtype is not torch.float32 or x.dtype is torch.float64:
            super().inner_products(out, x, y, workspace)
            return
        if self._gemm(x.dtype) == "widened":
            x, y = x.float(), y.float()
        (r, k), c, gemm = x.shape, len(y), self._mkl_gemm(x.dtype)
        products = out.data_ptr(), out.stride(0), x.data_ptr(), y.data_ptr(), r, c, k, DTYPES[x.dtype]
        if self._gemm(x.dtype) == "ours":
            words, packed = _packed_words(r, c, k, x.dtype, logits_alone=True), workspace.packed
            if packed is None or packed.numel() < words:  # for another dtype than the student's
                packed = torch.empty(words, dtype=torch.int32, device=x.device)
            self._native.inner_products(*products, packed.data_ptr(), self._native.pool)
        elif gemm is not None:
            self._native.inner_products_by_blas(*products, gemm)
        else:
            super().inner_products(out, x, y, workspace)

    def _mkl_gemm(self, dtype: torch.dtype) -> ctypes.c_void_p | None:
        """MKL's GEMM, called without torch's overhead. None: the GEMMs are ours, or torch chooses them."""
        if self._gemm(dtype) == "ours":
            return None
        # If the user allows less than float32 precision, torch.mm makes use of it.
        allowed = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        return None if dtype is torch.float32 and allowed in ("bf16", "tf32") else self._native.gemm.get(dtype)

    def _run(self, task: BlockTask, block: BlockParams, gemm: ctypes.c_void_p | None) -> None:
        x, y, workspace = task.x, task.y, task.workspace
        native, features = self._native, (x.data_ptr(), y.data_ptr(), x.shape[1])
        if workspace.packed is not None:
            native.block(ctypes.byref(block), *features, workspace.packed.data_ptr(), native.pool)
            return
        u = task.dz if workspace.u is None else workspace.u[: x.shape[0] * y.shape[0]].view(x.shape[0], y.shape[0])
        assert u is not None
        inner_products = u.data_ptr(), u.stride(0)
        if gemm is not None:
            native.block_by_blas(
                ctypes.byref(block), *features, *inner_products, gemm, self._machine.level, native.pool
            )
            return
        gemm_(u, x, y.T)  # the GEMMs of the gradients follow in block_and_grads
        native.epilogue(ctypes.byref(block), *inner_products, self._machine.level, native.pool)


def _block_params(task: BlockTask) -> BlockParams:
    """The task as a BlockParams of the library, without features and gradients."""
    pairs, dz, r, c = task.pairs, task.dz, task.x.shape[0], task.y.shape[0]
    block = BlockParams(
        rows=r,
        cols=c,
        scale=task.scale.data_ptr(),
        bias=task.bias.data_ptr(),
        dz_scale=address(task.dz_scale),
        offset=pairs.offset_within(r, c),
        image_ids=address(pairs.image_ids),
        text_ids=address(pairs.text_ids),
        image_weights=address(pairs.image_weights),
        text_weights=address(pairs.text_weights),
        dz=address(dz),
        dz_stride=0 if dz is None else dz.stride(0),
        sums=task.sums.data_ptr(),
        logits=DTYPES[task.scale.dtype],
        operand=DTYPES[task.x.dtype],
        loss_only=task.loss_only,
    )
    teacher = task.teacher
    if teacher is not None:
        block.teacher, block.teacher_stride = teacher.products.data_ptr(), teacher.products.stride(0)
        block.teacher_scale, block.teacher_bias = teacher.scale.data_ptr(), teacher.bias.data_ptr()
        block.teacher_weight = teacher.weight
    if pairs.ignore_ids or pairs.multi_positive is not None or pairs.has_balance or task.stats is not None:
        block.ignore_ids, block.soft_targets = pairs.ignore_ids, pairs.multi_positive == "soft_targets"
        block.image_masses, block.text_masses = address(pairs.image_masses), address(pairs.text_masses)
        block.has_balance = pairs.has_balance
        block.positive_weight, block.label_smoothing = pairs.positive_weight, pairs.label_smoothing
        block.stats = address(task.stats)
    return block


def _even_cut(length: int, most: int) -> int:
    """The size of a block when ``length`` is cut evenly, on multiples of PANEL, into blocks of at most ``most``."""
    return most if length <= most else -(-length // (-(-length // most) * PANEL)) * PANEL


def _logits_dtype(operand: torch.dtype) -> torch.dtype:
    return torch.float64 if operand is torch.float64 else torch.float32


def _packed_words(R: int, C: int, D: int, dtype: torch.dtype, logits_alone: bool = False) -> int:
    """int32 words of the largest pack: y transposed, and if not ``logits_alone`` y alone, or x together with dzᵀ."""
    in_word = 4 // dtype.itemsize
    r, c, d = -(-R // in_word), -(-C // in_word), -(-D // in_word)
    C, D = -(-C // PANEL) * PANEL, -(-D // PANEL) * PANEL
    return d * C if logits_alone else max(d * C, c * D, r * (D + C))
