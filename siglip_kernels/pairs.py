"""Which pairs are positive and what each pair weighs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairSpec:
    """The labels and weights of an [M, N] matrix of image-text pairs, never materialised.

    Pair (i, j) is positive when the ids are equal, if ids are given; otherwise when
    ``i + positive_offset == j``; with neither, every pair is negative. It weighs
    ``image_weights[i] * text_weights[j]``, an absent side counting as ones.
    """

    positive_offset: int | None = 0
    image_ids: Tensor | None = None  # [M] integer
    text_ids: Tensor | None = None  # [N] integer
    image_weights: Tensor | None = None  # [M] floating
    text_weights: Tensor | None = None  # [N] floating

    @property
    def has_ids(self) -> bool:
        return self.image_ids is not None

    @property
    def has_weights(self) -> bool:
        return self.image_weights is not None or self.text_weights is not None

    def block(self, rows: slice, cols: slice) -> PairSpec:
        """The pairs of images ``rows`` and texts ``cols``, numbered from the block's own corner."""
        offset = self.positive_offset
        if rows.start == cols.start == 0 and not self.has_ids and not self.has_weights:
            return self
        return PairSpec(
            None if offset is None else offset + rows.start - cols.start,
            _take(self.image_ids, rows),
            _take(self.text_ids, cols),
            _take(self.image_weights, rows),
            _take(self.text_weights, cols),
        )

    def prepared(self, x: Tensor, y: Tensor, dtype: torch.dtype) -> PairSpec:
        """As block kernels take it: vectors contiguous, weights of ``dtype`` and on both sides or on neither."""
        if not self.has_ids and not self.has_weights:
            return self
        return replace(
            self,
            image_ids=None if self.image_ids is None else self.image_ids.contiguous(),
            text_ids=None if self.text_ids is None else self.text_ids.contiguous(),
            image_weights=_weights(self.image_weights, x, dtype) if self.has_weights else None,
            text_weights=_weights(self.text_weights, y, dtype) if self.has_weights else None,
        )

    def may_have_positives(self, M: int, N: int) -> bool:
        """False only where no pair of an [M, N] matrix can be positive."""
        if self.has_ids:
            return True
        return self.positive_offset is not None and -M < self.positive_offset < N

    def positive_mask(self, M: int, N: int, device: torch.device | None = None) -> Tensor:
        """[M, N] bool: the labels, materialised; on ``device`` where no ids say where."""
        if self.image_ids is not None and self.text_ids is not None:
            return self.image_ids[:, None] == self.text_ids[None, :]
        mask = torch.zeros(M, N, dtype=torch.bool, device=device)
        if self.may_have_positives(M, N):
            mask.diagonal(self.positive_offset or 0).fill_(True)
        return mask


def _weights(weights: Tensor | None, features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.new_ones(len(features), dtype=dtype) if weights is None else weights.to(dtype).contiguous()


def _take(vector: Tensor | None, index: slice) -> Tensor | None:
    return None if vector is None else vector[index]
