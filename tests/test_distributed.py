"""The loss over a process group, against the joined batch in float64; what it sends, holds, refuses and survives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import siglip_kernels
from bench import load_module
from siglip_kernels import SigLipLoss, schedule, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.distributed import Exchange, ring
from siglip_kernels.distributed import schedule as distributed_schedule
from siglip_kernels.testing import make_inputs, relative_l2
from tests.ranks import Ranks, slices

WORLDS = (2, 3, 4, 8)
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
NAMES = ("loss", "image_features", "text_features", "logit_scale", "logit_bias")


# Equal ids, with arguments of their own; weights of which some are 0.
KINDS: dict[str, dict[str, Any]] = {
    "ignore ids": {"ignore_ids": True},
    "masses of both": {"multi_positive": "weights"},
    "masses of images": {"multi_positive": "weights", "anchors": "images"},
    "soft targets": {"multi_positive": "soft_targets"},
    "soft targets of texts": {"multi_positive": "soft_targets", "anchors": "texts"},
}


@dataclass(frozen=True)
class Batch:
    """What the ranks compute: images and texts of each, and how."""

    images: tuple[int, ...]
    texts: tuple[int, ...]
    D: int = 33
    dtype: torch.dtype = torch.float32
    regime: str = "trained"
    pairs: str = "diagonal"  # or "ids", "weights", "text_weights", "none", or a key of KINDS
    reduction: str = "batchmean"
    upstream: tuple[float, ...] | None = None  # of each rank; None: 1
    requires_grad: tuple[bool, ...] = (True, True, True, True)
    exchange: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return len(self.images)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the joined batch."""
        return make_inputs(sum(self.images), sum(self.texts), self.D, self.dtype, self.regime)

    def labels(self) -> dict[str, Tensor]:
        """Ids and weights of the joined batch."""
        M, N = sum(self.images), sum(self.texts)
        ids = {"image_ids": (torch.arange(M) % 5).to(torch.int32), "text_ids": torch.arange(N) % 7}
        weights = {"image_weights": torch.arange(M) % 3 + 0.5, "text_weights": 3.0 * (torch.arange(N) % 2)}
        text_weights = {"text_weights": weights["text_weights"]}
        if self.pairs in KINDS:
            return {**ids, "image_weights": torch.arange(1, M + 1) % 4 * 0.5, **text_weights}
        return {"ids": ids, "weights": weights, "text_weights": text_weights}.get(self.pairs, {})


def even(world: int, b: int = 12, **options: Any) -> Batch:
    return Batch((b,) * world, (b,) * world, **options)


def uneven(world: int, **options: Any) -> Batch:
    """One rank has a single image, another fewer texts than images."""
    images = tuple([1, 20, 7, 12, 3, 5, 1, 9][:world])
    texts = tuple([4, 13, 7, 12, 5, 1, 2, 9][:world])
    return Batch(images, texts, **options)


def of_rank(batch: Batch, rank: int) -> tuple[list[Tensor], dict[str, Any]]:
    """A rank's own arguments: the four that are differentiated, and the labels."""
    x, y, t, b = batch.inputs()
    rows, cols = slices(batch.images)[rank], slices(batch.texts)[rank]
    own = [x[rows].clone(), y[cols].clone(), t.clone(), b.clone()]
    labels = {name: v[rows if name.startswith("image") else cols] for name, v in batch.labels().items()}
    if batch.pairs == "none":
        labels["positive_offset"] = None
    return own, {**labels, **KINDS.get(batch.pairs, {})}


def call(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    """Loss and gradients of a rank, through autograd."""
    own, labels = of_rank(batch, rank)
    for t, wanted in zip(own, batch.requires_grad, strict=True):
        t.requires_grad_(wanted)
    exchange = Exchange(group, **batch.exchange)
    loss = sigmoid_loss(*own, **labels, reduction=batch.reduction, process_group=exchange)
    if loss.requires_grad:
        loss.backward(torch.tensor(1.0 if batch.upstream is None else batch.upstream[rank], dtype=loss.dtype))
    return [loss.detach(), *(t.grad for t in own)]


def gold(batch: Batch, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """The same of every rank, written out over the joined batch."""
    x, y, t, b = (v.to(dtype).requires_grad_() for v in batch.inputs())
    rows, cols = slices(batch.images), slices(batch.texts)
    labels = batch.labels()
    M, N = sum(batch.images), sum(batch.texts)
    positive = torch.zeros(M, N, dtype=torch.bool)
    kind = KINDS.get(batch.pairs, {})
    if batch.pairs == "ids" or "multi_positive" in kind:
        positive = labels["image_ids"][:, None] == labels["text_ids"]
    elif batch.pairs != "none":
        for r, c in zip(rows, cols, strict=True):
            positive[r, c].fill_diagonal_(True)
    u = labels.get("image_weights", torch.ones(M)).to(dtype)
    v = labels.get("text_weights", torch.ones(N)).to(dtype)
    z = torch.where(positive, 1.0, -1.0) * (t * x @ y.T + b)
    terms = -F.logsigmoid(z)
    if "multi_positive" in kind:
        counted = positive & (u > 0)[:, None] & (v > 0)
        k_i, k_j = counted.sum(1).clamp(min=1)[:, None], counted.sum(0).clamp(min=1)
        by = {
            "both": (1 / k_i.to(dtype) + 1 / k_j.to(dtype)) / 2,
            "images": 1 / k_i.to(dtype),
            "texts": 1 / k_j.to(dtype),
        }
        m = by[kind.get("anchors", "both")].expand(M, N)
        rest = -(1 - m) * F.logsigmoid(-z) if kind["multi_positive"] == "soft_targets" else 0.0
        terms = torch.where(positive, m * terms + rest, terms)
    if "ignore_ids" in kind:
        equal = labels["image_ids"][:, None] == labels["text_ids"]
        terms = torch.where(equal & ~positive, 0.0, terms)
    terms = terms * u[:, None] * v
    losses = []
    for r in rows:
        parts = {"sum": 1.0, "batchmean": u[r].sum(), "mean": u[r].sum() * v.sum()}
        losses.append(terms[r].sum() / parts[batch.reduction])
    upstream = batch.upstream or (1.0,) * batch.world
    dx, dy = torch.autograd.grad(sum(map(torch.mul, losses, map(torch.tensor, upstream))), (x, y), retain_graph=True)
    results = []
    for rank, (r, c) in enumerate(zip(rows, cols, strict=True)):
        scalars = torch.autograd.grad(upstream[rank] * losses[rank], (t, b), retain_graph=True)
        results.append([losses[rank].detach(), dx[r], dy[c], *scalars])
    return results


def assert_right(results: Sequence[Sequence[Any]], batch: Batch, limit: float, first: int = 0) -> None:
    """Every output of the ranks from ``first`` on within ``limit`` of the joined batch's; the unwanted are None."""
    wanted = dict(zip(NAMES, (True, *batch.requires_grad), strict=True))
    for rank, (ours, right) in enumerate(zip(results, gold(batch)[first:][: len(results)], strict=True), start=first):
        for name, a, b in zip(NAMES, ours, right, strict=True):
            if not wanted[name]:
                assert a is None, (rank, name)
                continue
            assert a.shape == b.shape, (rank, name)
            assert relative_l2(a, b) <= limit or not len(b.reshape(-1)), (rank, name, batch, relative_l2(a, b))


def drop_in(rank: int, group: Any, batch: Batch, dist_impl: str) -> list[Tensor | None]:
    """The same through SigLipLoss; the group is a smaller one than the world, but for the last."""
    own, _ = of_rank(batch, rank)
    for t in own:
        t.requires_grad_()
    loss = SigLipLoss(rank=rank, world_size=batch.world, dist_impl=dist_impl, process_group=group)(*own)
    loss.backward()
    return [loss.detach(), *(t.grad for t in own)]


@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
@pytest.mark.parametrize("sizes", [even, uneven])
@pytest.mark.parametrize("world", WORLDS)
def test_drop_in_against_the_joined_batch(ranks: Ranks, world: int, sizes: Any, dist_impl: str) -> None:
    batch = sizes(world)
    assert_right(ranks.run(world, drop_in, batch, dist_impl), batch, 5e-6)


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("pairs", ["ids", "weights", "text_weights", "none"])
def test_labels_weights_reductions(ranks: Ranks, pairs: str, reduction: str, algorithm: str) -> None:
    batch = uneven(3, pairs=pairs, reduction=reduction, exchange={"algorithm": algorithm})
    assert_right(ranks.run(3, call, batch), batch, 5e-6)


@pytest.mark.parametrize("exchange", [{}, {"algorithm": "gather"}, {"same_upstream": False}], ids=str)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("pairs", KINDS)
def test_more_kinds_of_pairs(ranks: Ranks, pairs: str, world: int, exchange: dict[str, Any]) -> None:
    upstream = None if exchange.get("same_upstream", True) else (0.5, -3.0, 7.0)[:world]
    batch = uneven(world, pairs=pairs, reduction="mean", upstream=upstream, exchange=exchange)
    assert_right(ranks.run(world, call, batch), batch, 5e-6)


@pytest.mark.parametrize("pairs", KINDS)
def test_more_kinds_of_pairs_in_float64(ranks: Ranks, pairs: str) -> None:
    batch = even(4, pairs=pairs, dtype=torch.float64, reduction="sum")
    assert_right(ranks.run(4, call, batch), batch, 1e-12)


def stats_of(rank: int, group: Any, batch: Batch) -> list[float]:
    own, labels = of_rank(batch, rank)
    _, found = sigmoid_loss(*own, **labels, process_group=Exchange(group, **batch.exchange), return_stats=True)
    return [float(value) for value in found]


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("pairs", ["diagonal", "ignore ids", "soft targets"])
def test_stats_are_of_a_ranks_images_and_all_texts(ranks: Ranks, pairs: str, algorithm: str) -> None:
    batch = uneven(3, pairs=pairs, exchange={"algorithm": algorithm})
    x, y, t, b = (v.double() for v in batch.inputs())
    z, labels = t * x @ y.T + b, batch.labels()
    rows, cols = slices(batch.images), slices(batch.texts)
    own, valid = (torch.full_like(z, value, dtype=torch.bool) for value in (False, True))
    for r, c in zip(rows, cols, strict=True):
        own[r, c].fill_diagonal_(True)
    positive = own
    if pairs != "diagonal":
        equal = labels["image_ids"][:, None] == labels["text_ids"]
        valid = (labels["image_weights"] != 0)[:, None] & (labels["text_weights"] != 0)
        valid, positive = (valid & (own | ~equal), own) if pairs == "ignore ids" else (valid, equal)
    for rank, found in enumerate(ranks.run(3, stats_of, batch)):
        right: list[float] = []
        for chosen in (positive & valid, ~positive & valid):
            of_class = z[rows[rank]][chosen[rows[rank]]]
            empty = not of_class.numel()
            right += [float(of_class.mean()), *([math.inf, -math.inf] if empty else map(float, of_class.aminmax()))]
            right.append(of_class.numel())
        assert found == pytest.approx(right, rel=1e-5, abs=1e-5, nan_ok=True), rank


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize(
    "wanted", [(a, b, c, c) for a in (True, False) for b in (True, False) for c in (True, False)], ids=str
)
def test_only_what_is_asked_for(ranks: Ranks, wanted: tuple[bool, ...], algorithm: str) -> None:
    batch = uneven(3, requires_grad=wanted, exchange={"algorithm": algorithm})
    assert_right(ranks.run(3, call, batch), batch, 5e-6)


# Of float64, exact but for the order of sums; half precision as NUMERICS has it for one process.
@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.bfloat16, 3.5e-3), (torch.float16, 3.5e-3)], ids=str
)
@pytest.mark.parametrize("pairs", ["diagonal", "weights"])
def test_dtypes(ranks: Ranks, pairs: str, dtype: torch.dtype, limit: float, algorithm: str) -> None:
    batch = uneven(4, D=64, dtype=dtype, pairs=pairs, exchange={"algorithm": algorithm})
    assert_right(ranks.run(4, call, batch), batch, limit)


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pairs", ["diagonal", "weights"])
def test_several_blocks(ranks: Ranks, pairs: str, dtype: torch.dtype, algorithm: str) -> None:
    """From 2,048 images on a rank's own block is cut in two, and a rank's texts are several blocks of a kernel."""
    batch = Batch((2100, 1500), (1100, 2300), D=40, dtype=dtype, pairs=pairs, exchange={"algorithm": algorithm})
    assert_right(ranks.run(2, call, batch), batch, 5e-6 if dtype is torch.float32 else 3.5e-3)


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("images", [(3, 0, 4), (3, 4, 5)])
def test_an_empty_rank(ranks: Ranks, images: tuple[int, ...], algorithm: str) -> None:
    """No images, or no texts, on a rank; a mean over nothing would be NaN."""
    batch = Batch(images, (2, 5, 0), reduction="sum", exchange={"algorithm": algorithm})
    assert_right(ranks.run(3, call, batch), batch, 5e-6)


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
def test_text_gradients_travel_in_half_precision(ranks: Ranks, algorithm: str) -> None:
    batch = uneven(4, exchange={"algorithm": algorithm, "text_gradient_dtype": torch.bfloat16})
    results = ranks.run(4, call, batch)
    right = gold(batch)
    errors = [relative_l2(ours[2], theirs[2]) for ours, theirs in zip(results, right, strict=True)]
    # Each rank that it passes may round by half a unit in the last place, 2^-9.
    assert all(1e-5 < error < 4 * 2**-9 for error in errors), errors
    others = [[*ours[:2], theirs[2], *ours[3:]] for ours, theirs in zip(results, right, strict=True)]
    assert_right(others, batch, 5e-6)


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("pairs", ["diagonal", "weights", "ids"])
def test_upstream_gradients_that_differ(ranks: Ranks, pairs: str, algorithm: str) -> None:
    exchange = {"algorithm": algorithm, "same_upstream": False}
    batch = uneven(3, pairs=pairs, upstream=(0.5, -3.0, 7.0), exchange=exchange)
    assert_right(ranks.run(3, call, batch), batch, 5e-6)


def test_upstream_gradients_that_differ_need_the_general_way(ranks: Ranks) -> None:
    """The test above can fail."""
    batch = uneven(3, upstream=(0.5, -3.0, 7.0))
    with pytest.raises(AssertionError, match="text_features"):
        assert_right(ranks.run(3, call, batch), batch, 5e-6)


def grads_outside_autograd(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    own, labels = of_rank(batch, rank)
    exchange = Exchange(group, **batch.exchange)
    return list(sigmoid_loss_and_grads(*own, **labels, reduction=batch.reduction, process_group=exchange))


@pytest.mark.parametrize("same_upstream", [True, False])
def test_loss_and_grads(ranks: Ranks, same_upstream: bool) -> None:
    batch = uneven(3, pairs="ids", exchange={"same_upstream": same_upstream})
    assert_right(ranks.run(3, grads_outside_autograd, batch), batch, 5e-6)


def repeated(rank: int, group: Any, batch: Batch) -> bool:
    first, *others = (call(rank, group, batch) for _ in range(5))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
def test_same_inputs_same_bits(ranks: Ranks, algorithm: str) -> None:
    assert all(ranks.run(4, repeated, uneven(4, pairs="weights", exchange={"algorithm": algorithm})))


def of_open_clip(rank: int, group: Any, batch: Batch, file: Path) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """(dist_impl, loss and gradients by open_clip's own loss, by ours) in every mode."""
    own, _ = of_rank(batch, rank)
    results = []
    for dist_impl in DIST_IMPLS:
        both = []
        for module in (load_module(file), siglip_kernels):
            arguments = [t.clone().requires_grad_() for t in own]
            loss = module.SigLipLoss(rank=rank, world_size=batch.world, dist_impl=dist_impl)(*arguments)
            loss.backward()
            both.append([loss.detach(), *(t.grad for t in arguments)])
        results.append((dist_impl, *both))
    return results


@pytest.mark.parametrize("world", WORLDS)
def test_open_clips_own_loss(open_clip_loss_file: Path, world: int) -> None:
    """In a world of its own: it knows the default group only."""
    ranks = Ranks(world)
    try:
        results = ranks.run(world, of_open_clip, even(world, D=64), open_clip_loss_file)
    finally:
        ranks.close()
    for rank, result in enumerate(results):
        for dist_impl, theirs, ours in result:
            errors = dict(zip(NAMES, map(relative_l2, ours, theirs), strict=True))
            assert all(error <= 5e-6 for error in errors.values()), (rank, dist_impl, errors)


# Changes to the exchange that the tests above must see.
def positives_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs_with = ring.pairs_with
    monkeypatch.setattr(ring, "pairs_with", lambda pairs, texts, is_own: pairs_with(pairs, texts, True))


def gradients_lost_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    send = ring.GradRing.accumulate_and_send

    def lossy(self: ring.GradRing, o: int, i: int) -> None:
        if self.topology.rank == 1:
            self.local.zero_()
        send(self, o, i)

    monkeypatch.setattr(ring.GradRing, "accumulate_and_send", lossy)


def own_scale_for_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = ring.RingTopology

    def without_scale(*, grad_scale: torch.Tensor, **parts: Any) -> ring.RingTopology:
        return topology(**parts, grad_scale=torch.ones_like(grad_scale))

    monkeypatch.setattr(distributed_schedule, "RingTopology", without_scale)


def own_texts_only_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    denominator = schedule.denominator
    monkeypatch.setattr(schedule, "denominator", lambda how, images, texts: denominator(how, images, texts / 3))


def counts_of_the_own_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        distributed_schedule, "_with_masses_of_all", lambda pairs, dtype, *others: pairs.with_masses(dtype)
    )


def masses_stay_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = ring.TextShard
    monkeypatch.setattr(distributed_schedule, "TextShard", lambda *parts: shard(*parts[:3], torch.zeros_like(parts[3])))


def call_mutated(rank: int, group: Any, batch: Batch, mutate: Callable[[pytest.MonkeyPatch], None]) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        mutate(monkeypatch)
        return call(rank, group, batch)


@pytest.mark.parametrize(
    "mutate", [positives_everywhere, gradients_lost_on_the_way, own_scale_for_every_rank, own_texts_only_in_the_mean]
)
def test_a_mutated_exchange_fails(ranks: Ranks, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    batch = even(3, reduction="mean")
    with pytest.raises(AssertionError):
        assert_right(ranks.run(3, call_mutated, batch, mutate), batch, 5e-6)


@pytest.mark.parametrize("mutate", [counts_of_the_own_rank, masses_stay_at_home])
def test_mutated_masses_fail(ranks: Ranks, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    batch = uneven(3, pairs="masses of both")
    with pytest.raises(AssertionError):
        assert_right(ranks.run(3, call_mutated, batch, mutate), batch, 5e-6)
