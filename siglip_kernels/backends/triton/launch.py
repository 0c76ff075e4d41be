"""Launches the block kernel: descriptors or pointers, the grid, and the fixed-order sum over its tiles."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.compiled import CompiledKernels
from siglip_kernels.backends.gpu import reduce_partials
from siglip_kernels.backends.triton import configs
from siglip_kernels.backends.triton.configs import Config, Variant
from siglip_kernels.backends.triton.kernels import _sigmoid_block_kernel
from siglip_kernels.gemm import allows_tf32, pad_to_alignment
from siglip_kernels.pairs import PairSpec
from siglip_kernels.stats import SIZE
from siglip_kernels.teachers import TeacherLogits

# The vectors of a block's pairs, views of the whole batch's: they may start anywhere.
PAIR_TENSORS = ("image_ids", "text_ids", "image_weights", "text_weights", "image_masses", "text_masses")
_kernels = CompiledKernels(_sigmoid_block_kernel)


def launch_block(variant: Variant, task: BlockTask) -> None:
    """Launch the kernel on one block, which needs ``variant``."""
    task = task._replace(x=pad_to_alignment(task.x), y=pad_to_alignment(task.y))
    programs = -(-len(task.x) // variant.config.block_m) * -(-len(task.y) // variant.config.block_n)
    partials = task.workspace.as_strided((3, programs), (programs, 1))
    stats_partials = None if task.stats is None else partials.new_empty(SIZE, programs)
    image_losses = None
    if task.image_losses is not None:
        image_losses = partials.new_empty(-(-len(task.y) // variant.config.block_n), len(task.x))
    _kernels.launch(
        (variant, task.x.device),
        programs,
        _arguments(variant, task, partials, stats_partials, image_losses),
        _options(variant),
        (
            *(task.scale, task.bias, task.dz_scale),
            *(getattr(task.pairs, name) for name in PAIR_TENSORS),
            *(() if task.teacher is None else task.teacher[:3]),
        ),
    )
    reduce_partials(task, partials, stats_partials)
    if task.image_losses is not None and image_losses is not None:
        torch.sum(image_losses, dim=0, dtype=task.image_losses.dtype, out=task.image_losses)


def variant_of(arch: str, task: BlockTask, config: Config | None = None) -> Variant:
    """The compilation that a block needs; ``config``: instead of the shipped one, fitted to the block's use."""
    (M, D), N, dtype = task.x.shape, task.y.shape[0], task.x.dtype
    pairs = task.pairs
    allow_tf32 = dtype is torch.float32 and allows_tf32()
    labels, masses = _labels(pairs, M, N), pairs.multi_positive or "none"
    outputs = task.loss_only, task.dz is not None, task.stats is not None
    has_teacher = task.teacher is not None
    balanced = pairs.has_balance or has_teacher
    uses = labels, pairs.has_weights, *outputs, masses, balanced, has_teacher, task.image_losses is not None
    return _variant(arch, config, M, N, D, dtype, allow_tf32, *uses)


@functools.lru_cache(maxsize=4096)
def _variant(
    arch: str,
    config: Config | None,
    M: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    labels: str,
    has_weights: bool,
    loss_only: bool,
    write_dz: bool,
    stats: bool,
    masses: str,
    balance: bool,
    teacher: bool,
    by_image: bool,
) -> Variant:
    if config is None:
        config = configs.choose(arch, M, N, D, dtype, labels, masses, stats, balance)
    else:
        config = configs.fitted(config, labels, masses, stats, balance)
    return Variant(
        arch,
        dtype,
        config,
        use_tma=configs.family(arch) in configs.TMA,
        precision=configs.precision(arch, dtype, allow_tf32),
        labels=labels,
        has_weights=has_weights,
        loss_only=loss_only,
        write_dz=write_dz,
        masses=masses,
        stats=stats,
        balance=balance,
        teacher=teacher,
        by_image=by_image,
    )


def compile_variant(variant: Variant) -> Any:
    """Compile what a launch of ``variant`` needs, for the target of Triton's active driver, without launch or memory.

    A later launch, in any process, finds it in Triton's cache on disk.
    """
    config, empty = variant.config, partial(torch.empty, dtype=torch.float32, device="meta")
    M, N, D = config.block_m, config.block_n, config.block_d
    task = BlockTask(
        x=empty(M, D, dtype=variant.dtype),
        y=empty(N, D, dtype=variant.dtype),
        scale=empty(()),
        bias=empty(()),
        pairs=_pairs_of(variant, M, N),
        sums=empty(3),
        dz=empty(M, N, dtype=variant.dtype) if variant.write_dz else None,
        dz_scale=empty(()) if variant.write_dz and variant.dtype is torch.float16 else None,
        workspace=None,
        teacher=TeacherLogits(empty(M, N), empty(()), empty(()), 0.5) if variant.teacher else None,
    )
    stats_partials = empty(SIZE, 1) if variant.stats else None
    image_losses = empty(1, M) if variant.by_image else None
    arguments = _arguments(variant, task, empty(3, 1), stats_partials, image_losses)
    return _sigmoid_block_kernel.warmup(grid=(1,), **arguments, **_options(variant))


def _arguments(
    variant: Variant,
    task: BlockTask,
    partials: Tensor,  # [3, programs]
    stats_partials: Tensor | None,  # [8, programs]
    image_losses: Tensor | None,  # [tiles of N, M]
) -> dict[str, Any]:
    """All arguments of the kernel, in its order."""
    config, use_tma, pairs, dz = variant.config, variant.use_tma, task.pairs, task.dz
    (M, D), N = task.x.shape, task.y.shape[0]
    dz_columns = config.block_n // config.dz_stores[variant.stats]
    products, teacher_scale, teacher_bias, teacher_weight = task.teacher or (None,) * 4
    return {
        "x": _operand(task.x, use_tma, config.block_m, config.block_d),
        "y": _operand(task.y, use_tma, config.block_n, config.block_d),
        "dz": None if dz is None else _operand(dz, use_tma, config.block_m, dz_columns),
        "partials_ptr": partials,
        "scale_ptr": task.scale,
        "bias_ptr": task.bias,
        "dz_scale_ptr": task.dz_scale,
        "image_ids_ptr": pairs.image_ids,
        "text_ids_ptr": pairs.text_ids,
        "image_weights_ptr": pairs.image_weights,
        "text_weights_ptr": pairs.text_weights,
        "image_masses_ptr": pairs.image_masses,
        "text_masses_ptr": pairs.text_masses,
        "stats_ptr": stats_partials,
        "image_losses_ptr": image_losses,
        "teacher_ptr": products,
        "teacher_scale_ptr": teacher_scale,
        "teacher_bias_ptr": teacher_bias,
        "M": M,
        "N": N,
        "D": D,
        "stride_xm": task.x.stride(0),
        "stride_yn": task.y.stride(0),
        "stride_dzm": 0 if dz is None else dz.stride(0),
        "stride_teacher": None if products is None else products.stride(0),
        "positive_offset": pairs.offset_within(M, N),
        "positive_weight": pairs.positive_weight if variant.balance else None,
        "label_smoothing": pairs.label_smoothing if variant.balance else None,
        "teacher_weight": teacher_weight,
        **_constants(variant),
    }


@functools.lru_cache(maxsize=1024)
def _constants(variant: Variant) -> dict[str, Any]:
    """The kernel's compile-time constants."""
    config = variant.config
    return {
        "LABELS": configs.LABELS[variant.labels],
        "HAS_WEIGHTS": variant.has_weights,
        "SOFT_TARGETS": variant.masses == "soft_targets",
        "LOSS_ONLY": variant.loss_only,
        "WRITE_DZ": variant.write_dz,
        "USE_TMA": variant.use_tma,
        "PRECISION": variant.precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "GROUP_M": config.group_m,
        "LANES": config.lanes,
        "DZ_STORES": config.dz_stores[variant.stats],
    }


@functools.lru_cache(maxsize=1024)
def _options(variant: Variant) -> dict[str, Any]:
    """The launch parameters."""
    return {
        "num_warps": variant.config.num_warps,
        "num_stages": variant.config.num_stages,
        "enable_fp_fusion": True,
    }


def _pairs_of(variant: Variant, M: int, N: int) -> PairSpec:
    """Pairs on the meta device that need ``variant``."""

    def vector(wanted: bool, length: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(length, dtype=dtype, device="meta") if wanted else None

    has_ids, has_masses = variant.labels in ("ids", "ignore"), variant.masses != "none"
    return PairSpec(
        positive_offset=None if variant.labels == "none" else 0,
        image_ids=vector(has_ids, M, torch.int64),
        text_ids=vector(has_ids, N, torch.int64),
        image_weights=vector(variant.has_weights, M, torch.float32),
        text_weights=vector(variant.has_weights, N, torch.float32),
        ignore_ids=variant.labels == "ignore",
        multi_positive=variant.masses if has_masses else None,
        image_masses=vector(has_masses, M, torch.float32),
        text_masses=vector(has_masses, N, torch.float32),
        positive_weight=2.0 if variant.balance else 1.0,
    )


def _labels(pairs: PairSpec, M: int, N: int) -> str:
    if pairs.ignore_ids:
        return "ignore"
    return "ids" if pairs.has_ids else "offset" if pairs.may_have_positives(M, N) else "none"


def _operand(t: Tensor, use_tma: bool, rows: int, cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols]) if use_tma else t
