"""Changes to the exchange between ranks, which its tests must see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from siglip_kernels import schedule
from siglip_kernels.distributed import ring
from siglip_kernels.distributed import schedule as distributed_schedule
from siglip_kernels.pairs import PairSpec
from tests.distributed.batches import Batch, assert_right, call, even, uneven
from tests.ranks import Ranks


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


def teacher_of_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that come from another rank, but with a teacher's features of the own ones."""
    pairs_with = ring.pairs_with

    def mutated(pairs: PairSpec, texts: ring.TextShard, is_own: bool) -> PairSpec:
        kept = tuple(t.text_features.roll(1, 0)[: len(texts.features)] for t in pairs.teachers)
        return pairs_with(pairs, texts if is_own else texts._replace(teachers=kept), is_own)

    monkeypatch.setattr(ring, "pairs_with", mutated)


def teachers_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs_with = ring.pairs_with

    def mutated(pairs: PairSpec, texts: ring.TextShard, is_own: bool) -> PairSpec:
        teachers = tuple(t._replace(weight=t.weight * is_own) for t in pairs_with(pairs, texts, is_own).teachers)
        return pairs_with(pairs, texts, is_own)._replace(teachers=teachers)

    monkeypatch.setattr(ring, "pairs_with", mutated)


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


@pytest.mark.parametrize("mutate", [teacher_of_other_texts, teachers_ignored])
def test_mutated_teachers_fail(ranks: Ranks, mutate: Callable[[pytest.MonkeyPatch], None]) -> None:
    batch = even(3, pairs="teacher")
    with pytest.raises(AssertionError):
        assert_right(ranks.run(3, call_mutated, batch, mutate), batch, 5e-6)
