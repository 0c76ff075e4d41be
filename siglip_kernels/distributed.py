"""The loss over a process group: a rank owns its images, and the texts of every rank come to meet them.

A rank's loss is that of its own images against all ranks' texts, divided as ``reduction`` says by its own batch; its
text gradient collects the contribution of every rank. That is open_clip's SigLipLoss; DDP then averages.

ring     Texts travel from rank to rank, the sum of their gradients behind them. Memory is that of a few local batches,
         whatever the number of ranks, and transfers run beside the block kernels. Over a mesh of nodes × GPUs there are
         two rings: texts go round a node while the next node's are on their way, by every GPU's own network card.
gather   One all-gather of the texts, one reduce-scatter of their gradients: the fewest messages, for small worlds.
         Memory grows with the global batch.

Before either the ranks agree (``agreement.py``): batches may differ in size. Gradients are formed in the forward pass,
and backward communicates nothing, given the same upstream gradient on every rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels import schedule, validation
from siglip_kernels.agreement import ALGORITHMS, Said, agree, all_gather, refusing
from siglip_kernels.backends.base import BlockKernel, Problem
from siglip_kernels.pairs import ANCHORS, MULTI_POSITIVE, PairSpec, marked
from siglip_kernels.ring import Lane, Texts, World, against, ring
from siglip_kernels.schedule import BlockLoop, Result, Wanted
from siglip_kernels.validation import FEATURE_DTYPES, one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Exchange:
    """How the ranks of a group exchange their texts; the same on every rank.

    Args:
        process_group: a ProcessGroup, a DeviceMesh of one dimension or two (nodes × GPUs of a node), or None for the
            default group. On GPUs, torch.cuda.set_device must have chosen this rank's.
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
        one_of("algorithm", self.algorithm, ALGORITHMS)
        if self.text_gradient_dtype not in (None, *FEATURE_DTYPES):
            raise ValueError(f"text_gradient_dtype must be a floating dtype or None; got {self.text_gradient_dtype!r}")


class Route(NamedTuple):
    """An Exchange as the operator takes it."""

    groups: str = ""  # their names, by line. None: one process; two: the group across nodes, the group within the node
    algorithm: str = "ring"
    text_gradient_dtype: torch.dtype | None = None
    same_upstream: bool = True

    def process_groups(self) -> list[ProcessGroup]:
        names = self.groups.splitlines()
        return [dist.distributed_c10d._resolve_process_group(name) for name in names]  # type: ignore[arg-type]


ONE_PROCESS = Route()


def route(process_group: Any) -> Route:
    """Of the argument ``process_group``: a group, a mesh or an Exchange."""
    exchange = process_group if isinstance(process_group, Exchange) else Exchange(process_group)
    names = "\n".join(group.group_name for group in _groups(exchange.process_group))
    return Route(names, exchange.algorithm, exchange.text_gradient_dtype, exchange.same_upstream)


def checked(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The operator's arguments up to ``dx``; where one is not as documented, ValueError or TypeError on every rank.

    ``arguments``: the public function's, by name; they are used up.
    """
    process_group = arguments.pop("process_group")
    if process_group is None:
        return *validation.checked(**arguments), *ONE_PROCESS
    taken = route(process_group)
    with contextlib.nullcontext() if torch.compiler.is_compiling() else refusing(taken.process_groups()):
        return *validation.checked(**arguments), *taken


def place(groups: Sequence[ProcessGroup]) -> tuple[int, int]:
    """(rank, world size) of this process in all of them: the last group's ranks are neighbours."""
    rank, size = 0, 1
    for group in groups:
        rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        size *= dist.get_world_size(group)
    return rank, size


def _groups(given: Any) -> list[ProcessGroup]:
    if not dist.is_available() or not dist.is_initialized():
        asked = "the default process group is asked for" if given is None else "process_group is given"
        raise ValueError(f"{asked}, but torch.distributed.init_process_group was not called")
    if given is None:
        given = dist.group.WORLD
    if isinstance(given, dist.DeviceMesh):
        if given.ndim not in (1, 2):
            raise ValueError(f"process_group must be a DeviceMesh of one dimension or two, got {given.ndim}")
        return [given.get_group(dimension) for dimension in range(given.ndim)]
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"process_group must be a group of this process, a DeviceMesh or an Exchange, got {given!r}")
    return [given]


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
    groups = taken.process_groups()
    dtype = schedule.accumulator_dtype(x.dtype)
    travelling = taken.text_gradient_dtype or dtype
    ranks = agree(
        groups,
        Said(
            texts=len(y),
            D=x.shape[1],
            dtype=FEATURE_DTYPES.index(x.dtype),
            algorithm=ALGORITHMS.index(taken.algorithm),
            text_gradient_dtype=FEATURE_DTYPES.index(travelling),
            same_upstream=taken.same_upstream,
            backward=upstream is not None,
            ids=pairs.has_ids,
            text_weights=pairs.text_weights is not None,
            gradients=wanted.any,
            text_gradients=wanted.dy,
            images=len(x),
            ignore_ids=pairs.ignore_ids,
            multi_positive=MULTI_POSITIVE.index(pairs.multi_positive),
            anchors=tuple(ANCHORS).index(pairs.anchors),
        ),
    )
    sizes = [said.texts for said in ranks]
    formed_here = taken.same_upstream or upstream is not None
    gives = [bool(said.text_gradients) and formed_here for said in ranks]
    if pairs.multi_positive is not None:
        pairs = _with_masses_of_all(pairs, dtype, max(said.images for said in ranks), max(sizes), groups)
    pairs, own = _own_texts(y, pairs, dtype, weighted=any(said.text_weights for said in ranks))

    is_ring = taken.algorithm == "ring"
    problem = Problem(len(x), (max if is_ring else sum)(sizes), x.shape[1], x.dtype, x.device, wanted.dx or any(gives))
    loop = BlockLoop(kernel, problem, x.contiguous(), scale, bias, wanted)
    loop.dx.zero_()
    loop.dx_begun = True
    denominator = _denominator(loop, pairs, own, sizes, reduction, groups)
    gain = loop.unscaled() / denominator
    gain = (gain if upstream is None else gain * upstream).to(dtype)

    lanes = [Lane(dist.get_rank(group), dist.get_world_size(group), group) for group in groups]
    world = World(lanes[0] if len(lanes) > 1 else Lane(), lanes[-1], sizes, gives, travelling, gain)
    result = loop.result(denominator, (ring if is_ring else _gather)(world, loop, pairs, own))
    # dy is gradient already, each rank having its own gain; so be dx.
    loop.dx.mul_(result.scalars[3])
    result.scalars[3] = 1
    return result


def _own_texts(y: Tensor, pairs: PairSpec, dtype: torch.dtype, weighted: bool) -> tuple[PairSpec, Texts]:
    """Ids and weights of one dtype everywhere; weights on every rank or on none."""
    ids = [None if t is None else t.to(torch.int64).contiguous() for t in (pairs.image_ids, pairs.text_ids)]
    weights = y.new_ones(len(y), dtype=dtype) if weighted and pairs.text_weights is None else pairs.text_weights
    weights = None if weights is None else weights.to(dtype).contiguous()
    return replace(pairs, image_ids=ids[0]), Texts(y.contiguous(), ids[1], weights, pairs.text_masses)


def _with_masses_of_all(
    pairs: PairSpec, dtype: torch.dtype, images: int, texts: int, groups: Sequence[ProcessGroup]
) -> PairSpec:
    """Masses by the positives among the images and texts of every rank, at most ``images`` and ``texts`` of each."""
    assert pairs.image_ids is not None
    assert pairs.text_ids is not None
    # Padded with zeros, which do not count.
    own = _padded(marked(pairs.image_ids, pairs.image_weights), images)
    every = all_gather(torch.cat([own, _padded(marked(pairs.text_ids, pairs.text_weights), texts)])[None], groups)
    return pairs.with_masses(dtype, every[:, :images].flatten(0, 1), every[:, images:].flatten(0, 1))


def _denominator(
    loop: BlockLoop, pairs: PairSpec, own: Texts, sizes: list[int], reduction: str, groups: Sequence[ProcessGroup]
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
        totals, maxima = all_gather(mine[None], groups).unbind(1)
        texts = totals.sum()
        largest.append(maxima.amax())
    loop.scale_dz(largest)
    return schedule.denominator(reduction, images, texts)


def _largest(weights: Tensor) -> Tensor:
    """[] float64, 1 where there is none."""
    return weights.amax().to(torch.float64) if len(weights) else weights.new_ones((), dtype=torch.float64)


def _gather(world: World, loop: BlockLoop, pairs: PairSpec, own: Texts) -> Tensor:
    """dy [n, D], empty if not wanted."""
    rank, sizes = world.rank, world.sizes
    begin = sum(sizes[:rank])
    end = begin + sizes[rank]
    groups = [lane.group for lane in (world.outer, world.inner) if lane.group is not None]
    texts = own.each(lambda t: _unpadded(all_gather(_padded(t, max(sizes)), groups), sizes))
    wanted = any(world.gives)
    contribution = loop.empty(sum(sizes) if wanted else 0)
    # Three parts, for images without a text of their own must not meet the next rank's on the diagonal.
    for part in (slice(0, begin), slice(begin, end), slice(end, sum(sizes))):
        own_part = part.start == begin and part.stop == end
        spec = against(pairs, texts.rows(part.start, part.stop), own_part)
        loop.add(texts.features[part], spec, contribution[part] if wanted else None)
    if not wanted:
        return contribution
    contribution = contribution.mul_(world.gain).to(world.travelling)
    even = min(sizes) == max(sizes)
    padded = contribution if even else torch.cat([_padded(t, max(sizes)) for t in contribution.split(sizes)])
    # torch 2.13 gave it another name.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    for group in groups:
        dy = padded.new_empty(len(padded) // dist.get_world_size(group), padded.shape[1])
        reduce_scatter(dy, padded, group=group)
        padded = dy
    return padded[: world.sums(rank)].to(loop.dtype)


def _padded(t: Tensor, rows: int) -> Tensor:
    """[rows, …], with zeros behind ``t``."""
    return t if len(t) == rows else torch.cat([t, t.new_zeros((rows - len(t), *t.shape[1:]))])


def _unpadded(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first ``sizes[k]`` rows of the k-th of equal parts, end to end."""
    if min(sizes) == max(sizes):
        return t
    return torch.cat([part[:n] for part, n in zip(t.split(max(sizes)), sizes, strict=True)])
