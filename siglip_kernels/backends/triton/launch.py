"""Launches the block kernel: descriptors or pointers, the grid, and the fixed-order sum over its tiles."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from siglip_kernels.backends.triton import configs
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
) -> None:
    x, y = aligned(x), aligned(y)
    (M, D), N = x.shape, y.shape[0]
    labels, masses = _labels(pairs, M, N), pairs.multi_positive or "none"
    config = configs.choose(arch, M, N, D, x.dtype, configs.is_general(labels, masses, stats is not None))
    use_tma = configs.family(arch) in configs.TMA
    programs = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)
    partials = partials[: 3 * programs].view(3, programs)
    stats_partials = None if stats is None else partials.new_empty(SIZE, programs)

    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _sigmoid_block_kernel[(programs,)](
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
            LABELS=configs.LABELS[labels],
            HAS_WEIGHTS=pairs.has_weights,
            SOFT_TARGETS=masses == "soft_targets",
            LOSS_ONLY=loss_only,
            WRITE_DZ=dz is not None,
            USE_TMA=use_tma,
            PRECISION=configs.precision(arch, x.dtype, _tf32_allowed()),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    written = 1 if loss_only else 3
    torch.sum(partials[:written], dim=1, dtype=sums.dtype, out=sums[:written])
    if stats is not None and stats_partials is not None:
        stats.copy_(merged([stats_partials.T.to(stats.dtype)], stats.device, stats.dtype))


def _labels(pairs: PairSpec, M: int, N: int) -> str:
    if pairs.ignore_ids:
        return "ignore"
    return "ids" if pairs.has_ids else "offset" if pairs.may_have_positives(M, N) else "none"


def _operand(t: Tensor, use_tma: bool, rows: int, cols: int) -> Tensor | TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols]) if use_tma else t


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
