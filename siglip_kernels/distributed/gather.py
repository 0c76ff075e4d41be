"""The gather: one all-gather of the texts, one reduce-scatter of their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.distributed.handshake import all_gather
from siglip_kernels.distributed.ring import RingTopology, TextShard, pairs_with
from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import BlockLoop


def gather(topology: RingTopology, loop: BlockLoop, pairs: PairSpec, own: TextShard) -> Tensor:
    """The text gradients dy [n, D]; empty if not needed."""
    rank, sizes = topology.rank, topology.sizes
    begin = sum(sizes[:rank])
    end = begin + sizes[rank]
    groups = [axis.group for axis in (topology.outer, topology.inner) if axis.group is not None]
    texts = own.map(lambda t: _unpad(all_gather(pad(t, max(sizes)), groups), sizes))
    needs_text_grad = any(topology.needs_text_grad)
    contribution = loop.new_rows(sum(sizes) if needs_text_grad else 0)
    # Three parts: images without a text of their own must not meet a text of the next rank on the diagonal.
    for part in (slice(0, begin), slice(begin, end), slice(end, sum(sizes))):
        is_own = part.start == begin and part.stop == end
        part_pairs = pairs_with(pairs, texts.rows(part.start, part.stop), is_own)
        loop.add(texts.features[part], part_pairs, contribution[part] if needs_text_grad else None)
    if not needs_text_grad:
        return contribution
    contribution = contribution.mul_(topology.grad_scale).to(topology.grad_dtype)
    is_even = min(sizes) == max(sizes)
    padded = contribution if is_even else torch.cat([pad(t, max(sizes)) for t in contribution.split(sizes)])
    # torch 2.13 renamed it.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    for group in groups:
        dy = padded.new_empty(len(padded) // dist.get_world_size(group), padded.shape[1])
        reduce_scatter(dy, padded, group=group)
        padded = dy
    return padded[: topology.grad_rows(rank)].to(loop.dtype)


def pad(t: Tensor, rows: int) -> Tensor:
    """[rows, …]: ``t``, then zeros."""
    return t if len(t) == rows else torch.cat([t, t.new_zeros((rows - len(t), *t.shape[1:]))])


def _unpad(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first ``sizes[k]`` rows of the k-th of equal parts, concatenated."""
    if min(sizes) == max(sizes):
        return t
    return torch.cat([part[:n] for part, n in zip(t.split(max(sizes)), sizes, strict=True)])
