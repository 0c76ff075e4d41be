"""The loss over a process group: a rank owns its images, and the texts of every rank come to meet them.

A rank's loss is that of its own images against all ranks' texts, divided as ``reduction`` says by its own batch; its
text gradient collects the contribution of every rank. That is open_clip's SigLipLoss; DDP then averages.

ring     Texts travel from rank to rank, the sum of their gradients behind them. Memory is that of a few local batches,
         whatever the number of ranks, and transfers run beside the block kernels.
gather   One all-gather of the texts, one reduce-scatter of their gradients: the fewest messages, for small worlds.
         Memory grows with the global batch.

Before either the ranks agree (``agreement.py``): batches may differ in size. Gradients are formed in the forward pass,
and backward communicates nothing, given the same upstream gradient on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels import schedule
from siglip_kernels.agreement import ALGORITHMS, DTYPES, Said, agree, all_gather
from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import BlockLoop, Result, Wanted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.device_mesh import DeviceMesh

# Images from which on a rank cuts its own block in two, to compute beside the first transfer and beside the last.
ENOUGH_TO_SPLIT = 1024


@dataclass(frozen=True)
class Exchange:
    """How the ranks of a group exchange their texts; the same on every rank.

    Args:
        process_group: a ProcessGroup, a DeviceMesh of one dimension, or None for the default group.
        algorithm: "ring" or "gather".
        text_gradient_dtype: in which text gradients travel; None: float32 (float64 for float64 features). Half
            precision halves that traffic, and rounds the sum on every rank that it passes.
        same_upstream: whether the loss has the same upstream gradient on every rank, as DDP and a shared GradScaler
            give it. False: any, for a fourth matrix product: text gradients are formed by a second exchange, in
            backward, which every rank must call.
    """

    process_group: ProcessGroup | DeviceMesh | None = None
    algorithm: str = "ring"
    text_gradient_dtype: torch.dtype | None = None
    same_upstream: bool = True

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(map(repr, ALGORITHMS))}; got {self.algorithm!r}")
        if self.text_gradient_dtype not in (None, *DTYPES):
            raise ValueError(f"text_gradient_dtype must be a floating dtype or None; got {self.text_gradient_dtype!r}")


class Route(NamedTuple):
    """An Exchange as the operator takes it; without a group name, there is one process."""

    group_name: str | None = None
    algorithm: str = "ring"
    text_gradient_dtype: torch.dtype | None = None
    same_upstream: bool = True

    def group(self) -> ProcessGroup | None:
        if self.group_name is None:
            return None
        return dist.distributed_c10d._resolve_process_group(self.group_name)  # type: ignore[arg-type]


ONE_PROCESS = Route()


def route(process_group: Any) -> Route:
    """Of the argument ``process_group``: a group, a mesh or an Exchange."""
    exchange = process_group if isinstance(process_group, Exchange) else Exchange(process_group)
    group = _group(exchange.process_group)
    return Route(group.group_name, exchange.algorithm, exchange.text_gradient_dtype, exchange.same_upstream)


def _group(given: Any) -> ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("process_group is given, but torch.distributed.init_process_group was not called")
    if given is None:
        given = dist.group.WORLD
    if isinstance(given, dist.DeviceMesh):
        if given.ndim != 1:
            raise ValueError(f"process_group must be a DeviceMesh of one dimension, got {given.ndim}")
        return given.get_group()
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"process_group must be a group of this process, a DeviceMesh or an Exchange, got {given!r}")
    return given


class Texts(NamedTuple):
    """What travels of one rank's texts, or of several ranks'."""

    features: Tensor  # [n, D]
    ids: Tensor | None  # [n] int64
    weights: Tensor | None  # [n]

    def tensors(self) -> list[Tensor]:
        return [t for t in self if t is not None]

    def each(self, function: Callable[[Tensor], Tensor]) -> Texts:
        ids, weights = (None if t is None else function(t) for t in self[1:])
        return Texts(function(self.features), ids, weights)

    def rows(self, begin: int, end: int) -> Texts:
        return self.each(lambda t: t[begin:end])


@dataclass(frozen=True)
class World:
    """The group as one rank sees it."""

    group: ProcessGroup
    rank: int
    sizes: list[int]  # texts of each rank
    gives: list[bool]  # whether the text gradients of each rank are to be formed
    travelling: torch.dtype  # of text gradients between ranks
    gain: Tensor  # [] what turns this rank's contribution into a gradient


def run(
    kernel: BlockKernel,
    x: Tensor,  # [M, D]
    y: Tensor,  # [N, D]
    scale: Tensor,  # one element
    bias: Tensor | None,  # one element
    pairs: PairSpec,  # of the local batch
    reduction: str,
    wanted: Wanted,
    taken: Route,
    upstream: Tensor | None,  # []: given in backward, where the text gradients are formed unless same_upstream
) -> Result:
    """``schedule.run`` over the group. Reads what the other ranks say back to the host, and nothing else."""
    group = taken.group()
    assert group is not None
    dtype = schedule.accumulator_dtype(x.dtype)
    travelling = taken.text_gradient_dtype or dtype
    ranks = agree(
        group,
        Said(
            texts=len(y),
            D=x.shape[1],
            dtype=DTYPES.index(x.dtype),
            algorithm=ALGORITHMS.index(taken.algorithm),
            text_gradient_dtype=DTYPES.index(travelling),
            same_upstream=taken.same_upstream,
            backward=upstream is not None,
            ids=pairs.has_ids,
            text_weights=pairs.text_weights is not None,
            gradients=wanted.any,
            text_gradients=wanted.dy,
        ),
    )
    sizes = [said.texts for said in ranks]
    formed_here = taken.same_upstream or upstream is not None
    gives = [bool(said.text_gradients) and formed_here for said in ranks]
    pairs, own = _own_texts(y, pairs, dtype, weighted=any(said.text_weights for said in ranks))

    ring = taken.algorithm == "ring"
    problem = Problem(len(x), (max if ring else sum)(sizes), x.shape[1], x.dtype, x.device, wanted.dx or any(gives))
    loop = BlockLoop(kernel, problem, x.contiguous(), scale, bias, wanted)
    loop.dx.zero_()
    loop.dx_begun = True
    denominator = _denominator(loop, pairs, own, sizes, reduction, group)
    gain = loop.unscaled() / denominator
    gain = (gain if upstream is None else gain * upstream).to(dtype)

    world = World(group, dist.get_rank(group), sizes, gives, travelling, gain)
    result = loop.result(denominator, (_ring if ring else _gather)(world, loop, pairs, own))
    # dy is gradient already, each rank having its own gain; so be dx.
    loop.dx.mul_(result.scalars[3])
    result.scalars[3] = 1
    return result


def _own_texts(y: Tensor, pairs: PairSpec, dtype: torch.dtype, weighted: bool) -> tuple[PairSpec, Texts]:
    """Ids and weights of one dtype everywhere; weights on every rank or on none."""
    ids = [None if t is None else t.to(torch.int64).contiguous() for t in (pairs.image_ids, pairs.text_ids)]
    weights = y.new_ones(len(y)) if weighted and pairs.text_weights is None else pairs.text_weights
    weights = None if weights is None else weights.to(dtype).contiguous()
    return replace(pairs, image_ids=ids[0]), Texts(y.contiguous(), ids[1], weights)


def _denominator(
    loop: BlockLoop, pairs: PairSpec, own: Texts, sizes: list[int], reduction: str, group: ProcessGroup
) -> float | Tensor:
    """Of this rank's loss. On the way, the loop learns how large the weights are."""
    images: float | Tensor = len(loop.x)
    texts: float | Tensor = sum(sizes)
    largest = []
    if pairs.image_weights is not None:
        images = schedule.total(pairs.image_weights)
        largest.append(_largest(pairs.image_weights))
    if own.weights is not None:
        mine = torch.stack([schedule.total(own.weights), _largest(own.weights)])
        totals, maxima = all_gather(mine[None], group).unbind(1)
        texts = totals.sum()
        largest.append(maxima.amax())
    loop.scale_dz(largest)
    return schedule.denominator(reduction, images, texts)


def _largest(weights: Tensor) -> Tensor:
    """[] float64, 1 where there is none."""
    return weights.amax().to(torch.float64) if len(weights) else weights.new_ones((), dtype=torch.float64)


def _against(pairs: PairSpec, texts: Texts, own: bool) -> PairSpec:
    """The rank's images against ``texts``; without ids, only its own texts are positive."""
    offset = pairs.positive_offset if own else None
    return replace(pairs, positive_offset=offset, text_ids=texts.ids, text_weights=texts.weights)


def _ring(world: World, loop: BlockLoop, pairs: PairSpec, own: Texts) -> Tensor:
    """dy [n, D], empty if not wanted. In step s a rank works on the texts of the rank s before it.

    Texts are sent on before they are worked on. The sum of their gradients begins on the rank after their own, gains
    every rank's contribution on the way round, and comes home last: W - 1 transfers of either.
    """
    rank, sizes, gives, W, M = world.rank, world.sizes, world.gives, len(world.sizes), len(loop.x)
    first = M // 2 if any(gives) and M >= ENOUGH_TO_SPLIT and W > 1 else M
    inboxes = [own.each(lambda t: t.new_empty((max(sizes), *t.shape[1:]))) for _ in range(2)]
    rows = max(n if give else 0 for n, give in zip(sizes, gives, strict=True))
    sums = [loop.empty(rows).to(world.travelling) for _ in range(2)]
    spare = loop.empty(rows)
    dy = loop.empty(sizes[rank] if gives[rank] else 0)
    mine = dy if gives[rank] else None

    texts_moving = _shift(world, own.tensors(), inboxes[1].rows(0, sizes[rank - 1]).tensors())
    loop.add(own.features, _against(pairs, own, True), mine, rows=slice(0, first))
    sums_moving: list[Work] = []
    for step in range(1, W):
        owner = (rank - step) % W
        here, there = step % 2, (step + 1) % 2
        _wait(texts_moving)
        texts = inboxes[here].rows(0, sizes[owner])
        if step + 1 < W:
            texts_moving = _shift(world, texts.tensors(), inboxes[there].rows(0, sizes[owner - 1]).tensors())
        contribution = spare[: sizes[owner] if gives[owner] else 0]
        loop.add(texts.features, _against(pairs, texts, False), contribution if gives[owner] else None)
        _wait(sums_moving)
        outgoing = sums[here][: len(contribution)]
        if step == 1:
            torch.mul(contribution, world.gain, out=outgoing)
        else:
            outgoing.addcmul_(contribution, world.gain)
        sums_moving = _shift(world, [outgoing], [sums[there][: sizes[owner - 1] if gives[owner - 1] else 0]])
    if first < M:
        loop.add(own.features, _against(pairs, own, True), mine, rows=slice(first, M), dy_begun=True)
    _wait(sums_moving)
    dy.mul_(world.gain)
    return dy.add_(sums[W % 2][: len(dy)]) if W > 1 else dy


def _shift(world: World, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Work]:
    """Begin to send to the next rank and to receive from the one before; empty tensors stay at home."""
    W, group = len(world.sizes), world.group
    if W == 1:
        return []
    after, before = (world.rank + 1) % W, (world.rank - 1) % W
    operations = [dist.P2POp(dist.isend, t, group=group, group_peer=after) for t in sent if t.numel()]
    operations += [dist.P2POp(dist.irecv, t, group=group, group_peer=before) for t in received if t.numel()]
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: Iterable[Work]) -> None:
    for work in works:
        work.wait()


def _gather(world: World, loop: BlockLoop, pairs: PairSpec, own: Texts) -> Tensor:
    """dy [n, D], empty if not wanted."""
    rank, sizes = world.rank, world.sizes
    begin = sum(sizes[:rank])
    end = begin + sizes[rank]
    texts = own.each(lambda t: _unpadded(all_gather(_padded(t, max(sizes)), world.group), sizes))
    wanted = any(world.gives)
    contribution = loop.empty(sum(sizes) if wanted else 0)
    # Three parts, for images without a text of their own must not meet the next rank's on the diagonal.
    for part in (slice(0, begin), slice(begin, end), slice(end, sum(sizes))):
        own_part = part.start == begin and part.stop == end
        spec = _against(pairs, texts.rows(part.start, part.stop), own_part)
        loop.add(texts.features[part], spec, contribution[part] if wanted else None)
    if not wanted:
        return contribution
    contribution = contribution.mul_(world.gain).to(world.travelling)
    even = min(sizes) == max(sizes)
    padded = contribution if even else torch.cat([_padded(t, max(sizes)) for t in contribution.split(sizes)])
    dy = padded.new_empty(max(sizes), padded.shape[1])
    # torch 2.13 gave it another name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(dy, padded, group=world.group)
    return dy[: sizes[rank] if world.gives[rank] else 0].to(loop.dtype)


def _padded(t: Tensor, rows: int) -> Tensor:
    """[rows, …], with zeros behind ``t``."""
    return t if len(t) == rows else torch.cat([t, t.new_zeros((rows - len(t), *t.shape[1:]))])


def _unpadded(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first ``sizes[k]`` rows of the k-th of equal parts, end to end."""
    if min(sizes) == max(sizes):
        return t
    return torch.cat([part[:n] for part, n in zip(t.split(max(sizes)), sizes, strict=True)])
