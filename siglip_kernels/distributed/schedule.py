"""The block loop over a process group: handshake, denominator, then the texts of every rank by ring or gather."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels import schedule
from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.distributed.gather import gather, pad
from siglip_kernels.distributed.handshake import ALGORITHMS, RankMetadata, all_gather, bits_of_float, handshake
from siglip_kernels.distributed.ring import RingAxis, RingTopology, TextShard, ring
from siglip_kernels.pairs import ANCHORS, MULTI_POSITIVE, PairSpec, ids_and_validity
from siglip_kernels.request import NeedsGrad, Request
from siglip_kernels.schedule import BlockLoop, Result
from siglip_kernels.validation import FEATURE_DTYPES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def run(
    kernel: BlockKernel, problem: Problem, request: Request, needs_grad: NeedsGrad, upstream: Tensor | None
) -> Result:
    """``siglip_kernels.schedule.run`` over the group. Reads the other ranks' metadata back to the host, nothing else.

    ``upstream`` []: given only in backward. Without ``same_upstream`` backward forms the text gradients.
    """
    exchange, x, pairs = request.exchange, request.x, request.pairs
    groups = exchange.process_groups()
    dtype = schedule.accumulator_dtype(x.dtype)
    grad_dtype = exchange.text_gradient_dtype or dtype
    ranks = handshake(groups, _metadata(request, needs_grad, grad_dtype, in_backward=upstream is not None))
    sizes = [rank.texts for rank in ranks]
    forms_text_grad = exchange.same_upstream or upstream is not None
    needs_text_grad = [bool(rank.needs_text_grad) and forms_text_grad for rank in ranks]
    if pairs.multi_positive is not None:
        pairs = _with_masses_of_all(pairs, dtype, max(rank.images for rank in ranks), max(sizes), groups)
    pairs, own = _own_texts(request.y, pairs, dtype, weighted=any(rank.has_text_weights for rank in ranks))

    is_ring = exchange.algorithm == "ring"
    problem = problem._replace(N=max(sizes) if is_ring else sum(sizes), needs_dz=needs_grad.x or any(needs_text_grad))
    loop = BlockLoop(kernel, problem, request, needs_grad)
    loop.dx.zero_()
    loop.accumulate_dx = True
    denominator = _denominator(loop, pairs, own, sizes, request.reduction, groups)
    grad_scale = loop.dx_scale() / denominator
    grad_scale = (grad_scale if upstream is None else grad_scale * upstream).to(dtype)

    axes = [RingAxis(dist.get_rank(group), dist.get_world_size(group), group) for group in groups]
    topology = RingTopology(
        outer=axes[0] if len(axes) > 1 else RingAxis(),
        inner=axes[-1],
        sizes=sizes,
        needs_text_grad=needs_text_grad,
        grad_dtype=grad_dtype,
        grad_scale=grad_scale,
    )
    result = loop.result(denominator, (ring if is_ring else gather)(topology, loop, pairs, own))
    # dy is already a gradient, because each rank has its own grad_scale. Make dx one too.
    loop.dx.mul_(result.scalars[3])
    result.scalars[3] = 1
    return result


def _metadata(request: Request, needs_grad: NeedsGrad, grad_dtype: torch.dtype, in_backward: bool) -> RankMetadata:
    exchange, x, pairs = request.exchange, request.x, request.pairs
    return RankMetadata(
        texts=len(request.y),
        D=x.shape[1],
        dtype=FEATURE_DTYPES.index(x.dtype),
        algorithm=ALGORITHMS.index(exchange.algorithm),
        text_gradient_dtype=FEATURE_DTYPES.index(grad_dtype),
        same_upstream=exchange.same_upstream,
        backward=in_backward,
        has_ids=pairs.has_ids,
        has_text_weights=pairs.text_weights is not None,
        needs_grad=needs_grad.any,
        needs_text_grad=needs_grad.y,
        images=len(x),
        ignore_ids=pairs.ignore_ids,
        multi_positive=MULTI_POSITIVE.index(pairs.multi_positive),
        anchors=tuple(ANCHORS).index(pairs.anchors),
        positive_weight=bits_of_float(pairs.positive_weight),
        label_smoothing=bits_of_float(pairs.label_smoothing),
        teachers=len(pairs.teachers),
        teacher_kinds=_digest(pairs),
    )


def _digest(pairs: PairSpec) -> int:
    """Of the teachers' widths, dtypes and weights."""
    kinds = [(t.text_features.shape[1], str(t.text_features.dtype), t.weight) for t in pairs.teachers]
    return zlib.crc32(repr(kinds).encode())


def _own_texts(y: Tensor, pairs: PairSpec, dtype: torch.dtype, weighted: bool) -> tuple[PairSpec, TextShard]:
    """This rank's pairs and texts. All ranks use one dtype for ids and one for weights; all have weights, or none."""
    image_ids, text_ids = (
        None if ids is None else ids.to(torch.int64).contiguous() for ids in (pairs.image_ids, pairs.text_ids)
    )
    weights = y.new_ones(len(y), dtype=dtype) if weighted and pairs.text_weights is None else pairs.text_weights
    weights = None if weights is None else weights.to(dtype).contiguous()
    pairs = pairs._replace(image_ids=image_ids, teachers=tuple(teacher.contiguous() for teacher in pairs.teachers))
    of_teachers = tuple(teacher.text_features for teacher in pairs.teachers)
    return pairs, TextShard(y.contiguous(), text_ids, weights, pairs.text_masses, of_teachers)


def _with_masses_of_all(
    pairs: PairSpec, dtype: torch.dtype, images: int, texts: int, groups: Sequence[ProcessGroup]
) -> PairSpec:
    """Masses that count the positives on every rank. A rank has at most ``images`` images and ``texts`` texts."""
    assert pairs.image_ids is not None
    assert pairs.text_ids is not None
    # Padded with zeros, which are not valid.
    own_images = pad(ids_and_validity(pairs.image_ids, pairs.image_weights), images)
    own_texts = pad(ids_and_validity(pairs.text_ids, pairs.text_weights), texts)
    every = all_gather(torch.cat([own_images, own_texts])[None], groups)
    return pairs.with_masses(dtype, every[:, :images].flatten(0, 1), every[:, images:].flatten(0, 1))


def _denominator(
    loop: BlockLoop, pairs: PairSpec, own: TextShard, sizes: list[int], reduction: str, groups: Sequence[ProcessGroup]
) -> float | Tensor:
    """The denominator of this rank's loss. Also gives the loop the largest weights."""
    images: float | Tensor = len(loop.x)
    texts: float | Tensor = sum(sizes)
    largest = []
    if pairs.image_weights is not None:
        images = schedule.total_weight(pairs.image_weights)
        largest.append(_largest(pairs.image_weights))
    if own.weights is not None:
        mine = torch.stack([schedule.total_weight(own.weights), _largest(own.weights)])
        totals, maxima = all_gather(mine[None], groups).unbind(1)
        texts = totals.sum()
        largest.append(maxima.amax())
    loop.scale_dz(largest)
    return schedule.denominator(reduction, images, texts)


def _largest(weights: Tensor) -> Tensor:
    """[] float64: the largest weight; 1 if there is none."""
    return weights.amax().to(torch.float64) if len(weights) else weights.new_ones((), dtype=torch.float64)
