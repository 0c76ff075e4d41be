"""Launches the block kernel: descriptors or pointers, the grid, and the fixed-order sum over its tiles."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.backends.triton import configs
from siglip_kernels.backends.triton.configs import Config, Variant
from siglip_kernels.backends.triton.kernels import _sigmoid_block_kernel
from siglip_kernels.pairs import PairSpec
from siglip_kernels.products import aligned
from siglip_kernels.stats import SIZE, merged


def launch_block(
    arch: str,
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # [] float32
    bias: Tensor,  # [] float32
    pairs: PairSpec,
    sums: Tensor,  # [3] float64, out
    dz: Tensor | None,  # [M, N], out
    dz_scale: Tensor | None,  # [] float32
    partials: Tensor,  # at least 3 · tiles float32
    loss_only: bool,
    stats: Tensor | None = None,  # [8] float64, out
    config: Config | None = None,  # in place of the shipped one
) -> None:
    x, y = aligned(x), aligned(y)
    variant = variant_of(arch, x, y, pairs, dz is not None, loss_only, stats is not None, config)
    programs = triton.cdiv(x.shape[0], variant.config.block_m) * triton.cdiv(y.shape[0], variant.config.block_n)
    partials = partials[: 3 * programs].view(3, programs)
    stats_partials = None if stats is None else partials.new_empty(SIZE, programs)
    arguments = _arguments(variant, x, y, scale, bias, pairs, dz, dz_scale, partials, stats_partials)

    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _sigmoid_block_kernel[(programs,)](*arguments, **_constants(variant))
    written = 1 if loss_only else 3
    torch.sum(partials[:written], dim=1, dtype=sums.dtype, out=sums[:written])
    if stats is not None and stats_partials is not None:
        stats.copy_(merged([stats_partials.T.to(stats.dtype)], stats.device, stats.dtype))


def variant_of(
    arch: str,
    x: Tensor,  # [M, D] aligned
    y: Tensor,  # [N, D]
    pairs: PairSpec,
    write_dz: bool,
    loss_only: bool,
    stats: bool,
    config: Config | None = None,
) -> Variant:
    """The compilation that a block asks for; ``config``: in place of the shipped one, narrowed where need be."""
    (M, D), N = x.shape, y.shape[0]
    labels, masses = _labels(pairs, M, N), pairs.multi_positive or "none"
    general = configs.is_general(labels, masses, stats)
    if config is None:
        config = configs.choose(arch, M, N, D, x.dtype, general)
    elif general:
        config = configs.narrowed(config)
    return Variant(
        arch,
        x.dtype,
        config,
        configs.family(arch) in configs.TMA,
        configs.precision(arch, x.dtype, _tf32_allowed()),
        labels,
        pairs.has_weights,
        loss_only,
        write_dz,
        masses,
        stats,
    )


def compile_variant(variant: Variant) -> Any:
    """What a launch of ``variant`` compiles, for the target of Triton's active driver; without a launch or memory.

    A launch in whichever process then finds it in Triton's cache on disk.
    """
    config, empty = variant.config, partial(torch.empty, dtype=torch.float32, device="meta")
    M, N, D = config.block_m, config.block_n, config.block_d
    x, y = (empty(rows, D, dtype=variant.dtype) for rows in (M, N))
    dz = empty(M, N, dtype=variant.dtype) if variant.write_dz else None
    dz_scale = empty(()) if variant.write_dz and variant.dtype is torch.float16 else None
    arguments = _arguments(
        *(variant, x, y, empty(()), empty(()), _pairs_of(variant, M, N), dz, dz_scale, empty(3, 1)),
        empty(SIZE, 1) if variant.stats else None,
    )
    return _sigmoid_block_kernel.warmup(*arguments, grid=(1,), **_constants(variant))


def _arguments(
    variant: Variant,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: PairSpec,
    dz: Tensor | None,
    dz_scale: Tensor | None,
    partials: Tensor,  # [3, programs]
    stats_partials: Tensor | None,  # [8, programs]
) -> tuple[Any, ...]:
    """The kernel's, up to its constants."""
    config, use_tma = variant.config, variant.use_tma
    (M, D), N = x.shape, y.shape[0]
    return (
        _operand(x, use_tma, config.block_m, config.block_d),
        _operand(y, use_tma, config.block_n, config.block_d),
        None if dz is None else _operand(dz, use_tma, config.block_m, config.block_n // 4),
        partials,
        scale,
        bias,
        dz_scale,
        pairs.image_ids,
        pairs.text_ids,
        pairs.image_weights,
        pairs.text_weights,
        pairs.image_masses,
        pairs.text_masses,
        stats_partials,
        M,
        N,
        D,
        x.stride(0),
        y.stride(0),
        0 if dz is None else dz.stride(0),
        pairs.offset_within(M, N),
    )


def _constants(variant: Variant) -> dict[str, Any]:
    """The kernel's, and how it is launched."""
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
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _pairs_of(variant: Variant, M: int, N: int) -> PairSpec:
    """Pairs without memory that ask for ``variant``."""

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
    )


def _labels(pairs: PairSpec, M: int, N: int) -> str:
    if pairs.ignore_ids:
        return "ignore"
    return "ids" if pairs.has_ids else "offset" if pairs.may_have_positives(M, N) else "none"


def _operand(t: Tensor, use_tma: bool, rows: int, cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols]) if use_tma else t


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
