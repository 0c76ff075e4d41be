"""The terms of the loss, pair by pair in float64: the scale of sums that cancel, and what rounding dz costs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import denominator, pair_spec, pair_weights, targets


class Scalars(NamedTuple):
    logit_scale: float
    logit_bias: float


class Terms(NamedTuple):
    """The parts of dz, without the denominator; dz is their difference."""

    negative: Tensor  # [M, N] float64: weight · (1 - target) · σ(z)
    positive: Tensor  # [M, N] float64: weight · positive_weight · target · σ(-z)
    denominator: Tensor | float  # of the loss


def scalar_terms(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], upstream: float = 1.0, reduction: str = "batchmean", **pairs: Any
) -> Scalars:
    """Σ|terms| of dscale and of dbias in float64. The terms of these sums cancel, so their errors are judged by it."""
    x, y, scale, bias = (t.double() for t in inputs)
    terms = _terms(x, y, scale, bias, reduction, pair_spec(**pairs))
    size = (terms.negative + terms.positive) * (abs(upstream) / terms.denominator)
    return Scalars(float((size * (x @ y.T)).abs().sum()), float(size.sum()))


def cancellation(inputs: tuple[Tensor, Tensor, Tensor, Tensor], **pairs: Any) -> float:
    """How much larger ‖dz‖ would be if the two parts of a pair did not cancel: 1 where every pair has only one."""
    x, y, scale, bias = (t.double() for t in inputs)
    negative, positive, _ = _terms(x, y, scale, bias, "sum", pair_spec(**pairs))
    dz = float((negative - positive).norm())
    return float((negative + positive).norm()) / dz if dz > 0 else 1.0


def feature_grads_of_rounded_dz(
    x: Tensor,  # [M, D] float16 or bfloat16
    y: Tensor,  # [N, D] the same
    scale: Tensor,
    bias: Tensor,
    upstream: float,
    reduction: str = "batchmean",
    **pairs: Any,
) -> tuple[Tensor, Tensor]:
    """(dx, dy) in the features' dtype if nothing is rounded but dz and they: the best that half precision can do."""
    dtype, spec = x.dtype, pair_spec(**pairs)
    x, y, scale, bias = (t.double() for t in (x, y, scale, bias))
    terms = _terms(x, y, scale, bias, reduction, spec)
    # A power of two that keeps float16 from underflow, as in schedule.py.
    exponent = 14 - sum(int(torch.frexp(w.max()).exponent) for w in pair_weights(spec, x, y))
    exponent -= math.ceil(math.log2(max(1.0, spec.positive_weight)))
    dz_scale = 2.0**exponent if dtype is torch.float16 else 1.0
    dz = ((terms.negative - terms.positive) * dz_scale).to(dtype).double() / dz_scale
    factor = upstream * scale / terms.denominator
    return (factor * (dz @ y)).to(dtype), (factor * (dz.T @ x)).to(dtype)


def _terms(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, reduction: str, pairs: PairSpec) -> Terms:
    z = scale * (x @ y.T) + bias
    is_positive = pairs.positive_mask(x.shape[0], y.shape[0], z.device)
    u, v = pair_weights(pairs, x, y)
    target, factor = targets(pairs, is_positive, u, v)
    negative, positive = (1 - target) * torch.sigmoid(z), pairs.positive_weight * target * torch.sigmoid(-z)
    weight = factor * u[:, None] * v
    ignored = pairs.ignored_mask(*z.shape)
    if ignored is not None:
        weight = weight.masked_fill(ignored, 0.0)
    return Terms(weight * negative, weight * positive, denominator(u, v, reduction))
