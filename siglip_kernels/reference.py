"""The definition of the loss in plain torch: materialised logits, gradients by autograd, any dtype.

Tests and benchmarks compare with it. In float64 it is the gold value. In the features' own dtype it is the eager loss
that people train with today. Source: Zhai et al. 2023, arXiv 2303.15343, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.pairs import ANCHORS, PairSpec
from siglip_kernels.stats import LogitStats, logit_stats, measure_logits, reduce_stats
from siglip_kernels.teachers import Teacher, as_teachers, total_weight


def sigmoid_loss_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positive_offset: int | None = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    ignore_ids: bool = False,
    multi_positive: str | None = None,
    anchors: str = "both",
    positive_weight: float = 1.0,
    label_smoothing: float = 0.0,
    teacher: Teacher | Sequence[Teacher] | None = None,
    return_stats: bool = False,
    reduction: str = "batchmean",
) -> Any:
    """The same arguments and value as :func:`siglip_kernels.sigmoid_loss`, in O(M·N) memory and without its checks.

    Computes in the features' dtype and returns a scalar of that dtype. It is twice differentiable. If the denominator
    is 0 because there are no pairs, its gradients are 0; those of sigmoid_loss are NaN.
    """
    x, y = image_features, text_features
    pairs = pair_spec(
        positive_offset=positive_offset,
        image_ids=image_ids,
        text_ids=text_ids,
        image_weights=image_weights,
        text_weights=text_weights,
        ignore_ids=ignore_ids,
        multi_positive=multi_positive,
        anchors=anchors,
        positive_weight=positive_weight,
        label_smoothing=label_smoothing,
        teacher=teacher,
    )

    z = _scalar(logit_scale, x) * (x @ y.T)
    if logit_bias is not None:
        z = z + _scalar(logit_bias, x)
    mask = pairs.positive_mask(x.shape[0], y.shape[0], x.device)
    u, v = pair_weights(pairs, x, y)
    if multi_positive is None and not pairs.has_balance and not pairs.teachers:
        terms = -F.logsigmoid(torch.where(mask, z, -z))
    else:
        target, factor = targets(pairs, mask, u, v)
        # Of 0 times infinity nothing is left.
        terms = -torch.where(target == 0, 0.0, positive_weight * target * F.logsigmoid(z))
        terms = terms - torch.where(target == 1, 0.0, (1 - target) * F.logsigmoid(-z))
        terms = factor * terms
    ignored = pairs.ignored_mask(*z.shape)
    if ignored is not None:
        terms = terms.masked_fill(ignored, 0.0)

    if pairs.has_weights:
        terms = terms * (u[:, None] * v[None, :])
    loss = terms.sum() / denominator(u, v, reduction)
    return (loss, _stats(z.detach(), pairs)) if return_stats else loss


def pair_spec(teacher: Teacher | Sequence[Teacher] | None = None, **arguments: Any) -> PairSpec:
    """The spec for the public arguments that say something of pairs."""
    return PairSpec(**arguments, teachers=as_teachers(teacher))


def pair_weights(pairs: PairSpec, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """([M], [N]) in the features' dtype: the weight of pair (i, j) is the product of its two. Ones if not given."""
    u = x.new_ones(x.shape[0]) if pairs.image_weights is None else pairs.image_weights.to(x.dtype)
    v = y.new_ones(y.shape[0]) if pairs.text_weights is None else pairs.text_weights.to(y.dtype)
    return u, v


def targets(pairs: PairSpec, positive: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two [M, N] in the dtype of u: the target of every pair, and the mass that is a factor of its term."""
    mass = torch.ones_like(positive, dtype=u.dtype)
    if pairs.multi_positive is not None:
        mass = torch.where(positive, masses(positive, u, v, pairs.anchors).to(u.dtype), mass)
    is_soft = pairs.multi_positive == "soft_targets"
    label = positive * mass if is_soft else positive.to(u.dtype)
    target = pairs.label_smoothing + (1 - 2 * pairs.label_smoothing) * label
    if pairs.teachers:
        target = (1 - total_weight(pairs.teachers)) * target
    for teacher in pairs.teachers:
        z = teacher.image_features.to(u.dtype) @ teacher.text_features.to(u.dtype).T * _scalar(teacher.logit_scale, u)
        z = z if teacher.logit_bias is None else z + _scalar(teacher.logit_bias, u)
        target = target + teacher.weight * z.sigmoid()
    return target, torch.ones_like(mass) if is_soft else mass


def masses(positive: Tensor, u: Tensor, v: Tensor, anchors: str) -> Tensor:
    """[M, N] at least float32: the mass that each positive pair gets from its anchors. Padding gets no share."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    images = (positive & (v > 0)).sum(1, keepdim=True).clamp(min=1).to(dtype)
    texts = (positive & (u > 0)[:, None]).sum(0, keepdim=True).clamp(min=1).to(dtype)
    of_image, of_text = ANCHORS[anchors]
    return of_image / images + of_text / texts


def denominator(u: Tensor, v: Tensor, reduction: str) -> Tensor | float:
    """The divisor of the sum over pairs."""
    return 1.0 if reduction == "sum" else u.sum() if reduction == "batchmean" else u.sum() * v.sum()


def _stats(z: Tensor, pairs: PairSpec) -> LogitStats:
    totals = reduce_stats([], z.device, torch.float64)
    if z.numel():
        measure_logits(z, pairs, totals)
    return logit_stats(totals, z.dtype)


def _scalar(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype).reshape(()) if isinstance(value, Tensor) else value
