"""The loss over a process group, against the joined batch in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import siglip_kernels
from bench import load_module
from siglip_kernels import SigLipLoss, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import relative_l2
from tests.distributed.batches import KINDS, NAMES, WORLDS, Batch, assert_right, call, even, gold, of_rank, uneven
from tests.ranks import Ranks, slices

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


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
