"""Diagnostics of the logits, from the same pass as the loss: mean, least, largest and number of each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels.pairs import PairSpec

# What a block kernel writes: Σ z, the number, the least z, the largest z; each for the positives, then the negatives.
SUMS, MINIMA, MAXIMA = slice(0, 4), slice(4, 6), slice(6, 8)
SIZE = 8
_EMPTY = ((4, 0.0), (2, math.inf), (2, -math.inf))  # (entries, value without pairs) of sums and numbers, least, largest


class LogitStats(NamedTuple):
    """The logits z = t·<x_i, y_j> + b of positive and of negative pairs, detached; all tensors of shape [].

    Pairs that are left out, and pairs with an image or a text of weight 0, are in neither class. A NaN logit makes the
    mean NaN; the least and the largest may skip it. In a class without pairs the mean is NaN, the least +inf, the
    largest -inf.
    """

    positive_mean: Tensor  # mean, least and largest have the loss's dtype
    positive_min: Tensor
    positive_max: Tensor
    positive_count: Tensor  # int64
    negative_mean: Tensor
    negative_min: Tensor
    negative_max: Tensor
    negative_count: Tensor


def logit_stats(totals: Tensor, dtype: torch.dtype) -> LogitStats:
    """The public stats from ``totals`` [8], in the layout that block kernels write and :func:`reduce_stats` keeps."""
    positive_sum, negative_sum, positives, negatives, *extremes = totals.unbind()
    positive_min, negative_min, positive_max, negative_max = (extreme.to(dtype) for extreme in extremes)
    return LogitStats(
        positive_mean=(positive_sum / positives).to(dtype),
        positive_min=positive_min,
        positive_max=positive_max,
        positive_count=positives.to(torch.int64),
        negative_mean=(negative_sum / negatives).to(dtype),
        negative_min=negative_min,
        negative_max=negative_max,
        negative_count=negatives.to(torch.int64),
    )


def reduce_stats(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[8]: the stats of all blocks. ``parts``: [blocks, 8] each, with at least one block."""
    if not parts:
        return torch.cat([torch.full((n,), v, dtype=dtype, device=device) for n, v in _EMPTY])
    every = torch.cat([*parts])
    return torch.cat([every[:, SUMS].sum(0), every[:, MINIMA].amin(0), every[:, MAXIMA].amax(0)])


def measure_logits(z: Tensor, pairs: PairSpec, out: Tensor) -> None:
    """Write the stats of the materialised logits z [M, N] into ``out`` [8]."""
    M, N = z.shape
    positive, valid = pairs.positive_mask(M, N, z.device), valid_mask(pairs, z)
    classes = positive & valid, ~positive & valid
    for index, chosen in enumerate(classes):
        out[index] = torch.where(chosen, z, 0.0).sum(dtype=out.dtype)
        out[2 + index] = chosen.sum()
        out[4 + index] = torch.where(chosen, z, math.inf).amin()
        out[6 + index] = torch.where(chosen, z, -math.inf).amax()


def valid_mask(pairs: PairSpec, z: Tensor) -> Tensor:
    """[M, N] bool: the pairs that are not left out and have no weight of 0."""
    ignored = pairs.ignored_mask(*z.shape)
    valid = torch.ones_like(z, dtype=torch.bool) if ignored is None else ~ignored
    if pairs.image_weights is not None:
        valid &= (pairs.image_weights != 0)[:, None]
    if pairs.text_weights is not None:
        valid &= (pairs.text_weights != 0)[None, :]
    return valid
