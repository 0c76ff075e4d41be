"""What the ranks of a group tell each other before an exchange, so that none waits for what will never come."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_kernels.pairs import ANCHORS, MULTI_POSITIVE
from siglip_kernels.validation import FEATURE_DTYPES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALGORITHMS = ("ring", "gather")


class Said(NamedTuple):
    """One rank's part; all integers."""

    ready: int = 1  # 0: it has refused its own arguments
    texts: int = 0  # N
    D: int = 0
    dtype: int = 0  # of the features, in FEATURE_DTYPES
    algorithm: int = 0  # in ALGORITHMS
    text_gradient_dtype: int = 0  # in FEATURE_DTYPES
    same_upstream: int = 0
    backward: int = 0  # the exchange belongs to backward
    ids: int = 0  # given
    text_weights: int = 0  # given
    gradients: int = 0  # any is wanted
    text_gradients: int = 0  # wanted
    images: int = 0  # M
    ignore_ids: int = 0
    multi_positive: int = 0  # in MULTI_POSITIVE
    anchors: int = 0  # in ANCHORS


# What must be the same on every rank: how a message names it, and its value. The first that differs is named, so the
# dtype comes before that of text gradients, which by default follows it.
ALIKE: dict[str, tuple[str, Callable[[int], Any]]] = {
    "backward": ("being in backward", bool),
    "algorithm": ("process_group: the algorithm of the exchange", ALGORITHMS.__getitem__),
    "same_upstream": ("process_group: same_upstream", bool),
    "D": ("image_features and text_features: D", int),
    "dtype": ("image_features and text_features: the dtype", FEATURE_DTYPES.__getitem__),
    "text_gradient_dtype": ("process_group: text_gradient_dtype", FEATURE_DTYPES.__getitem__),
    "ids": ("image_ids and text_ids: being given", bool),
    "ignore_ids": ("ignore_ids", bool),
    "multi_positive": ("multi_positive", MULTI_POSITIVE.__getitem__),
    "anchors": ("anchors", tuple(ANCHORS).__getitem__),
}


def agree(groups: Sequence[ProcessGroup], said: Said) -> list[Said]:
    """What every rank said, in order; the same ValueError on every rank where that does not go together."""
    ranks = _all_said(groups, said)
    refusing = [rank for rank, other in enumerate(ranks) if not other.ready]
    if refusing:
        raise ValueError(f"{_named(refusing)} refused the arguments; the error there says why")
    for name, (what, value) in ALIKE.items():
        found: dict[int, list[int]] = {}
        for rank, other in enumerate(ranks):
            found.setdefault(getattr(other, name), []).append(rank)
        if len(found) > 1:
            values = "; ".join(f"{value(v)} on {_named(where)}" for v, where in found.items())
            raise ValueError(f"{what} must be the same on every rank of the group, got {values}")
    _check_gradients(ranks)
    return ranks


def _check_gradients(ranks: Sequence[Said]) -> None:
    without = [rank for rank, said in enumerate(ranks) if not said.gradients]
    unwanted = [rank for rank, said in enumerate(ranks) if not said.text_gradients]
    if len(unwanted) == len(ranks):
        return
    if without:
        raise ValueError(
            f"text_features require grad on other ranks, but {_named(without)} called with gradients off, or with "
            "nothing that requires grad: expected gradients on all ranks or on none"
        )
    if unwanted and not ranks[0].same_upstream:
        raise ValueError(
            f"text_features do not require grad on {_named(unwanted)}, but on other ranks: with same_upstream=False "
            "they must on all ranks or on none"
        )


@contextlib.contextmanager
def refusing(groups: Sequence[ProcessGroup]) -> Iterator[None]:
    """Tell the other ranks if this one refuses its arguments inside: they would wait for it."""
    try:
        yield
    except (TypeError, ValueError):
        with contextlib.suppress(RuntimeError):
            _all_said(groups, Said(ready=0))
        raise


def _all_said(groups: Sequence[ProcessGroup], said: Said) -> list[Said]:
    if all(dist.get_world_size(group) == 1 for group in groups):
        return [said]
    device = _device(groups[0])
    # On a stream of its own, so that reading the answer waits for no kernel of the training step.
    with torch.cuda.stream(_stream(torch.cuda.current_device())) if device.type == "cuda" else contextlib.nullcontext():
        every = all_gather(torch.tensor(said, dtype=torch.int64, device=device), groups).tolist()
    return [Said(*every[i : i + len(said)]) for i in range(0, len(every), len(said))]


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all calls: torch has 32, which it hands out in turn and whose memory it keeps apart."""
    return torch.cuda.Stream(device)


def _device(group: ProcessGroup) -> torch.device:
    """On which the group can gather: the CPU if it can, for integers that the host is waiting for."""
    types = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in types else types[0])


def all_gather(t: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """[ranks · n, …]: ``t`` [n, …] of every rank, of one shape; the last group's ranks are neighbours."""
    # torch 2.13 gave it another name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for group in reversed(groups):
        gathered = t.new_empty((dist.get_world_size(group) * len(t), *t.shape[1:]))
        gather(gathered, t, group=group)
        t = gathered
    return t


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
