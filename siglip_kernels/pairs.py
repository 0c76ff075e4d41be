"""Which pairs are positive, which are left out, and what each pair weighs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.teachers import Teacher

MULTI_POSITIVE = (None, "weights", "soft_targets")
# The positives of an anchor share a mass of 1. Values: how much of a pair's mass is its image's, how much its text's.
ANCHORS = {"both": (0.5, 0.5), "images": (1.0, 0.0), "texts": (0.0, 1.0)}


class PairSpec(NamedTuple):
    """The labels and weights of an [M, N] matrix of image-text pairs, never materialised.

    If ids are given, pair (i, j) is positive when its ids are equal; otherwise when ``i + positive_offset == j``. With
    neither, every pair is negative. With ``ignore_ids`` the offset still says what is positive, and other pairs of
    equal ids are left out. The weight of a pair is ``image_weights[i] * text_weights[j]``; an absent side counts as
    ones.

    With ``multi_positive`` a positive pair has the mass ``image_masses[i] + text_masses[j]``. It is a factor of the
    pair's weight ("weights"), or the target of its sigmoid ("soft_targets"). :meth:`prepared` computes masses that are
    absent.

    The target of a pair is its label: 1, 0 or, with "soft_targets", the mass of a positive one. ``label_smoothing`` ε
    makes it ε + (1 - 2 ε) label, and teachers of the weights λ make that (1 - Σ λ) target + Σ λ q. ``positive_weight``
    is a factor of the part of every term that the target weighs.
    """

    positive_offset: int | None = 0
    image_ids: Tensor | None = None  # [M] integer
    text_ids: Tensor | None = None  # [N] integer
    image_weights: Tensor | None = None  # [M] floating
    text_weights: Tensor | None = None  # [N] floating
    ignore_ids: bool = False
    multi_positive: str | None = None
    anchors: str = "both"
    image_masses: Tensor | None = None  # [M] floating
    text_masses: Tensor | None = None  # [N] floating
    positive_weight: float = 1.0
    label_smoothing: float = 0.0
    teachers: tuple[Teacher, ...] = ()  # of the same images and texts; their scales and biases are tensors

    @property
    def has_ids(self) -> bool:
        return self.image_ids is not None

    @property
    def has_weights(self) -> bool:
        return self.image_weights is not None or self.text_weights is not None

    @property
    def has_balance(self) -> bool:
        """Whether ``positive_weight`` or ``label_smoothing`` changes anything."""
        return self.positive_weight != 1.0 or self.label_smoothing != 0.0

    @property
    def has_weighted_terms(self) -> bool:
        """Whether terms have factors: weights, masses, a balance or teachers. Block kernels then get both weights."""
        return self.has_weights or self.multi_positive is not None or self.has_balance or bool(self.teachers)

    @property
    def has_two_parts(self) -> bool:
        """Whether the terms of some pairs have softplus(z) and softplus(-z) in them."""
        return self.multi_positive == "soft_targets" or self.label_smoothing != 0.0 or bool(self.teachers)

    def block(self, rows: slice, cols: slice) -> PairSpec:
        """The pairs of images ``rows`` and texts ``cols``, numbered from the block's own corner."""
        offset = self.positive_offset
        if rows.start == cols.start == 0 and not self.has_ids and not self.has_weights:
            return self
        return self._replace(
            positive_offset=None if offset is None else offset + rows.start - cols.start,
            image_ids=_take(self.image_ids, rows),
            text_ids=_take(self.text_ids, cols),
            image_weights=_take(self.image_weights, rows),
            text_weights=_take(self.text_weights, cols),
            image_masses=_take(self.image_masses, rows),
            text_masses=_take(self.text_masses, cols),
            teachers=tuple(teacher.rows(rows, cols) for teacher in self.teachers),
        )

    def prepared(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> PairSpec:
        """What block kernels take: contiguous tensors, int64 ids, weights of ``dtype`` on both sides or on neither.

        With ``multi_positive`` there are also masses of ``dtype``; with them, a balance or teachers always weights.
        """
        if not self.has_ids and not self.has_weighted_terms:
            return self
        spec = self
        if self.multi_positive is not None and self.image_masses is None:
            spec = self.with_masses(dtype)
        weighted = self.has_weighted_terms
        return spec._replace(
            image_ids=None if self.image_ids is None else self.image_ids.to(torch.int64).contiguous(),
            text_ids=None if self.text_ids is None else self.text_ids.to(torch.int64).contiguous(),
            image_weights=_weights(self.image_weights, x, dtype) if weighted else None,
            text_weights=_weights(self.text_weights, y, dtype) if weighted else None,
            teachers=tuple(teacher.contiguous() for teacher in self.teachers),
        )

    def with_masses(self, dtype: torch.dtype, images: Tensor | None = None, texts: Tensor | None = None) -> PairSpec:
        """This spec with its masses in ``dtype``. They count the positives among ``images`` and ``texts``, each [m, 2]
        from :func:`ids_and_validity`.

        The default is the images and texts of this spec. Over a group they are those of every rank.
        """
        assert self.image_ids is not None
        assert self.text_ids is not None
        images = ids_and_validity(self.image_ids, self.image_weights) if images is None else images
        texts = ids_and_validity(self.text_ids, self.text_weights) if texts is None else texts
        image_share, text_share = ANCHORS[self.anchors]
        return self._replace(
            image_masses=image_share / count_equal(self.image_ids, texts).clamp(min=1).to(dtype),
            text_masses=text_share / count_equal(self.text_ids, images).clamp(min=1).to(dtype),
        )

    def may_have_positives(self, M: int, N: int) -> bool:
        """False only if no pair of an [M, N] matrix can be positive."""
        if self.has_ids and not self.ignore_ids:
            return True
        return self.offset_within(M, N) < N

    def offset_within(self, M: int, N: int) -> int:
        """The offset. N if it makes no pair of an [M, N] matrix positive: no pair has the offset N."""
        offset = self.positive_offset
        return offset if offset is not None and -M < offset < N else N

    def positive_mask(self, M: int, N: int, device: torch.device | None = None) -> Tensor:
        """[M, N] bool: the labels, materialised on the ids' device; without ids, on ``device``."""
        if self.image_ids is not None and self.text_ids is not None:
            if not self.ignore_ids:
                return self.image_ids[:, None] == self.text_ids[None, :]
            device = self.image_ids.device
        mask = torch.zeros(M, N, dtype=torch.bool, device=device)
        if self.may_have_positives(M, N):
            mask.diagonal(self.positive_offset or 0).fill_(True)
        return mask

    def ignored_mask(self, M: int, N: int) -> Tensor | None:
        """[M, N] bool: the pairs that are left out, materialised; None without ``ignore_ids``."""
        if not self.ignore_ids or self.image_ids is None or self.text_ids is None:
            return None
        return (self.image_ids[:, None] == self.text_ids[None, :]) & ~self.positive_mask(M, N)


def ids_and_validity(ids: Tensor, weights: Tensor | None) -> Tensor:
    """[n, 2] int64: each id, and 1 if it can count as a positive. An id of weight 0, such as padding, has 0."""
    ids = ids.to(torch.int64)
    return torch.stack([ids, torch.ones_like(ids) if weights is None else (weights > 0).to(torch.int64)], dim=1)


def count_equal(ids: Tensor, among: Tensor) -> Tensor:
    """[n] int64: for each of ``ids`` [n], how many valid entries of ``among`` [m, 2] have that id.

    ``among`` is from :func:`ids_and_validity`. Sorts and sums integers: the same bits every time, and nothing is read
    back to the host.
    """
    ids = ids.to(torch.int64).contiguous()
    ordered, order = among[:, 0].sort()
    before = F.pad(among[:, 1][order].cumsum(0), (1, 0))  # valid ones among the first 0, 1, …, m
    begin, end = (before[torch.searchsorted(ordered, ids, right=right)] for right in (False, True))
    return end - begin


def _weights(weights: Tensor | None, features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.new_ones(len(features), dtype=dtype) if weights is None else weights.to(dtype).contiguous()


def _take(vector: Tensor | None, index: slice) -> Tensor | None:
    return None if vector is None else vector[index]
