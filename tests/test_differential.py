"""Random calls against the definition: a sample of ``python -m tests.differential``, and that it finds mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from siglip_kernels import dispatch, validation
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.backends.cpu import CpuBlockKernel
from siglip_kernels.pairs import PairSpec
from tests import differential


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The calls are small, and a second thread spins while it waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_sample_of_random_calls() -> None:
    differential.search(500, seed=1)


def _short_cut_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every tensor were ordinary: lazily negated ones are read as they lie."""
    monkeypatch.setattr(dispatch, "are_ordinary", lambda tensors: True)
    monkeypatch.setattr(dispatch, "check_memory", lambda names, tensors: None)


def _blind_to_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no compiler, tracer or transform were there."""
    monkeypatch.setattr(dispatch, "has_no_mode", lambda: True)


def _weights_of_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PairSpec.prepared

    def prepared(self: PairSpec, *arguments: Any) -> PairSpec:
        spec = original(self, *arguments)
        if spec.text_weights is not None:
            spec.text_weights.fill_(1.0)
        return spec

    monkeypatch.setattr(PairSpec, "prepared", prepared)


def _offset_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PairSpec.offset_within
    monkeypatch.setattr(PairSpec, "offset_within", lambda self, M, N: min(N, original(self, M, N) + 1))


def _scale_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    original = validation._scalar

    def rounded(name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
        return original(name, value, x).bfloat16().to(original(name, value, x).dtype)

    monkeypatch.setattr(validation, "_scalar", rounded)


def _a_tangent_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "refuse_transforms", lambda tensors=(): None)


def _last_column_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = CpuBlockKernel.block_and_grads

    def block_and_grads(self: Any, task: BlockTask) -> None:
        original(self, task)
        if task.dx is not None:
            task.dx[:, -1:] = 0

    monkeypatch.setattr(CpuBlockKernel, "block_and_grads", block_and_grads)


MUTATIONS = (
    _short_cut_for_all,
    _blind_to_modes,
    _weights_of_one_side,
    _offset_by_one,
    _scale_in_half_precision,
    _a_tangent_is_dropped,
    _last_column_skipped,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__[1:])
def test_a_mutation_is_found(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(BaseException) as found:  # noqa: PT011
        differential.search(400, seed=2, shrink=False)
    assert not isinstance(found.value, KeyboardInterrupt | SystemExit)
