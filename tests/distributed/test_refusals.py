"""Arguments and ranks that do not fit together are refused on every rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels import SigLipLoss, sigmoid_loss
from siglip_kernels.distributed import Exchange
from tests.distributed.batches import Batch, assert_right, call, of_rank, uneven
from tests.ranks import Ranks


def refused(rank: int, group: Any, batch: Batch, odd: dict[str, Any], mode: str = "") -> list[Any]:
    """As ``call``, with what is odd about rank 1; then again with nothing odd: the group must still be in step."""
    try:
        if rank == 1 and mode == "gradients off":
            with torch.no_grad():
                call(rank, group, batch)
        elif rank == 1 and mode == "weights":
            own, _ = of_rank(batch, rank)
            sigmoid_loss(*own, text_weights=torch.ones(1000), process_group=group)
        elif rank == 1 and mode == "place":
            SigLipLoss(rank=0, world_size=batch.world, process_group=group)(*of_rank(batch, rank)[0])
        elif rank == 1 and mode == "backend":
            own, _ = of_rank(batch, rank)
            sigmoid_loss(*own, backend="cuda", process_group=group)
        else:
            call(rank, group, replace(batch, **odd) if rank == 1 else batch)
    except (TypeError, ValueError) as error:
        return [str(error), call(rank, group, batch)]
    return ["no error", []]


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"D": 34}, r"image_features and text_features: D must be the same .* 33 on ranks 0, 2; 34 on rank 1"),
        (
            {"dtype": torch.float64},
            r"text_features: the dtype must be the same .* torch.float32 on ranks 0, 2; torch.float64 on rank 1",
        ),
        ({"pairs": "ids"}, r"image_ids and text_ids: .* False on ranks 0, 2; True on rank 1"),
        ({"pairs": "ignore ids"}, r"ignore_ids must be the same .* False on ranks 0, 2; True on rank 1"),
        ({"pairs": "soft targets"}, r"multi_positive must be .* weights on ranks 0, 2; soft_targets on rank 1"),
        ({"pairs": "masses of images"}, r"anchors must be .* both on ranks 0, 2; images on rank 1"),
        ({"pairs": "balance"}, r"positive_weight must be .* 1.0 on ranks 0, 2; 2.0 on rank 1"),
        ({"pairs": "teacher"}, r"teacher: their number must be .* 0 on ranks 0, 2; 1 on rank 1"),
        ({"exchange": {"algorithm": "gather"}}, r"algorithm .* ring on ranks 0, 2; gather on rank 1"),
        ({"exchange": {"same_upstream": False}}, r"same_upstream .* True on ranks 0, 2; False on rank 1"),
        ({"exchange": {"text_gradient_dtype": torch.float16}}, r"text_gradient_dtype .* torch.float16 on rank 1"),
    ],
)
def test_what_differs_is_refused_on_every_rank(ranks: Ranks, odd: dict[str, Any], says: str) -> None:
    others = {"ignore ids": "ids", "soft targets": "masses of both", "masses of images": "masses of both"}
    others["balance"] = others["teacher"] = "ignore ids"
    batch = uneven(3, pairs=others.get(odd.get("pairs", ""), "diagonal"))
    results = ranks.run(3, refused, batch, odd)
    messages = {message for message, _ in results}
    assert len(messages) == 1
    with pytest.raises(ValueError, match=says):
        raise ValueError(messages.pop())
    assert_right([after for _, after in results], batch, 5e-6)


@pytest.mark.parametrize(
    ("mode", "says"),
    [
        ("weights", "text_weights must have shape"),
        ("backend", "'cuda'"),
        ("place", "rank = 0, world_size = 3 were given, but this process is rank 1 of 3"),
    ],
)
def test_bad_arguments_of_one_rank_are_told_to_the_others(ranks: Ranks, mode: str, says: str) -> None:
    batch = uneven(3)
    results = ranks.run(3, refused, batch, {}, mode)
    assert says in results[1][0]
    assert results[0][0] == results[2][0] == "rank 1 refused the arguments; the error there says why"
    assert_right([after for _, after in results], batch, 5e-6)


def test_gradients_off_on_one_rank(ranks: Ranks) -> None:
    """Refused where others need its part of their text gradients; right where nobody does."""
    batch = uneven(3)
    results = ranks.run(3, refused, batch, {}, "gradients off")
    assert len({message for message, _ in results}) == 1
    assert "rank 1 called with gradients off" in results[0][0]
    assert_right([after for _, after in results], batch, 5e-6)
    frozen = uneven(3, requires_grad=(True, False, True, True))
    results = ranks.run(3, off_on_rank_1, frozen)
    assert all(t is None for t in results[1][1:])
    for rank in (0, 2):
        assert_right([results[rank]], frozen, 5e-6, first=rank)


def off_on_rank_1(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    with torch.set_grad_enabled(rank != 1):
        return call(rank, group, batch)


def test_text_gradients_wanted_on_some_ranks_only(ranks: Ranks) -> None:
    """Each rank's own affair where the upstream gradient is shared; else backward would wait for who does not come."""
    batch = uneven(4)
    frozen = replace(batch, requires_grad=(True, False, True, True))
    for algorithm in ("ring", "gather"):
        exchange = {"algorithm": algorithm}
        results = ranks.run(4, texts_frozen_on_some, replace(batch, exchange=exchange))
        for rank, result in enumerate(results):
            assert_right([result], frozen if rank % 2 else batch, 5e-6, first=rank)
    results = ranks.try_run(4, texts_frozen_on_some, replace(batch, exchange={"same_upstream": False}))
    assert all(isinstance(result, ValueError) and "on ranks 1, 3" in str(result) for result in results)


def texts_frozen_on_some(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    return call(rank, group, replace(batch, requires_grad=(True, rank % 2 == 0, True, True)))


def misuse(rank: int, group: Any) -> list[str]:
    """What is said of arguments that no exchange follows."""
    x = torch.ones(2, 3)
    errors = []
    for make in (
        lambda: sigmoid_loss(x, x, 1.0, process_group="gloo"),
        lambda: sigmoid_loss(x, x, 1.0, process_group=dist.GroupMember.NON_GROUP_MEMBER),
        lambda: SigLipLoss(rank=1 - rank, world_size=2, process_group=group)(x, x, 1.0),
        lambda: SigLipLoss(rank=rank, world_size=3, process_group=group)(x, x, 1.0),
        lambda: Exchange(group, "bidir"),
        lambda: Exchange(group, text_gradient_dtype=torch.int32),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            make()
        errors.append(str(error.value))
    return errors


def test_misuse(ranks: Ranks) -> None:
    for rank, errors in enumerate(ranks.run(2, misuse)):
        for error, says in zip(
            errors,
            (
                "process_group must be a group of this process",
                "process_group must be a group of this process",
                f"this process is rank {rank} of 2",
                f"world_size = 3 were given, but this process is rank {rank} of 2",
                "algorithm must be one of 'ring', 'gather'; got 'bidir'",
                "text_gradient_dtype must be a floating dtype or None; got torch.int32",
            ),
            strict=True,
        ):
            assert says in error
