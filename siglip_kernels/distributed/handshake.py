"""Metadata that the ranks of a group exchange before any features, so that no rank waits for data that never comes."""

from __future__ import annotations

import contextlib
import functools
import struct
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


def bits_of_float(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def float_of_bits(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


class RankMetadata(NamedTuple):
    """The metadata of one rank's call; all integers."""

    ready: int = 1  # 0: an argument was bad, and this rank raises
    texts: int = 0  # N
    D: int = 0
    dtype: int = 0  # of the features, in FEATURE_DTYPES
    algorithm: int = 0  # in ALGORITHMS
    text_gradient_dtype: int = 0  # in FEATURE_DTYPES
    same_upstream: int = 0
    backward: int = 0  # the exchange belongs to backward
    has_ids: int = 0
    has_text_weights: int = 0
    needs_grad: int = 0  # any
    needs_text_grad: int = 0
    images: int = 0  # M
    ignore_ids: int = 0
    multi_positive: int = 0  # in MULTI_POSITIVE
    anchors: int = 0  # in ANCHORS
    positive_weight: int = 0  # bits of a double
    label_smoothing: int = 0  # the same
    teachers: int = 0  # their number
    teacher_kinds: int = 0  # a digest of their widths, dtypes and weights


# What must be the same on every rank: its name in an error, and its value. Only the first difference is reported, so
# the features' dtype comes before the text gradients' dtype, which depends on it by default.
MUST_MATCH: dict[str, tuple[str, Callable[[int], Any]]] = {
    "backward": ("being in backward", bool),
    "algorithm": ("process_group: the algorithm of the exchange", ALGORITHMS.__getitem__),
    "same_upstream": ("process_group: same_upstream", bool),
    "D": ("image_features and text_features: D", int),
    "dtype": ("image_features and text_features: the dtype", FEATURE_DTYPES.__getitem__),
    "text_gradient_dtype": ("process_group: text_gradient_dtype", FEATURE_DTYPES.__getitem__),
    "has_ids": ("image_ids and text_ids: being given", bool),
    "ignore_ids": ("ignore_ids", bool),
    "multi_positive": ("multi_positive", MULTI_POSITIVE.__getitem__),
    "anchors": ("anchors", tuple(ANCHORS).__getitem__),
    "positive_weight": ("positive_weight", float_of_bits),
    "label_smoothing": ("label_smoothing", float_of_bits),
    "teachers": ("teacher: their number", int),
    "teacher_kinds": ("teacher: width, dtype and weight of each (here a digest of them)", hex),
}


def handshake(groups: Sequence[ProcessGroup], metadata: RankMetadata) -> list[RankMetadata]:
    """The metadata of every rank, in order. If they do not match, every rank raises the same ValueError."""
    ranks = _all_gather_metadata(groups, metadata)
    failed = [rank for rank, other in enumerate(ranks) if not other.ready]
    if failed:
        raise ValueError(f"{_names(failed)} refused the arguments; the error there says why")
    for name, (what, value) in MUST_MATCH.items():
        found: dict[int, list[int]] = {}
        for rank, other in enumerate(ranks):
            found.setdefault(getattr(other, name), []).append(rank)
        if len(found) > 1:
            values = "; ".join(f"{value(v)} on {_names(where)}" for v, where in found.items())
            raise ValueError(f"{what} must be the same on every rank of the group, got {values}")
    _check_gradients(ranks)
    return ranks


def _check_gradients(ranks: Sequence[RankMetadata]) -> None:
    without = [rank for rank, metadata in enumerate(ranks) if not metadata.needs_grad]
    unwanted = [rank for rank, metadata in enumerate(ranks) if not metadata.needs_text_grad]
    if len(unwanted) == len(ranks):
        return
    if without:
        raise ValueError(
            f"text_features require grad on other ranks, but {_names(without)} called with gradients off, or with "
            "nothing that requires grad: expected gradients on all ranks or on none"
        )
    if unwanted and not ranks[0].same_upstream:
        raise ValueError(
            f"text_features do not require grad on {_names(unwanted)}, but on other ranks: with same_upstream=False "
            "they must on all ranks or on none"
        )


@contextlib.contextmanager
def propagate_errors(groups: Sequence[ProcessGroup]) -> Iterator[None]:
    """Re-raise a TypeError or ValueError from inside, and make the handshake of the other ranks raise too."""
    try:
        yield
    except (TypeError, ValueError):
        with contextlib.suppress(RuntimeError):
            _all_gather_metadata(groups, RankMetadata(ready=0))
        raise


def _all_gather_metadata(groups: Sequence[ProcessGroup], metadata: RankMetadata) -> list[RankMetadata]:
    if all(dist.get_world_size(group) == 1 for group in groups):
        return [metadata]
    device = _device(groups[0])
    # On a separate stream: reading the answer then waits for no kernel of the training step.
    with torch.cuda.stream(_stream(torch.cuda.current_device())) if device.type == "cuda" else contextlib.nullcontext():
        every = all_gather(torch.tensor(metadata, dtype=torch.int64, device=device), groups).tolist()
    size = len(metadata)
    return [RankMetadata._make(every[i : i + size]) for i in range(0, len(every), size)]


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One stream for all calls. torch hands out 32 streams in turn, and caches memory separately for each."""
    return torch.cuda.Stream(device)


def _device(group: ProcessGroup) -> torch.device:
    """The device on which the group gathers: the CPU if it can, because the host waits for the integers."""
    types = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in types else types[0])


def all_gather(t: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    """[ranks · n, …]: ``t`` [n, …] of every rank, of one shape. Ranks of the last group are adjacent."""
    # torch 2.13 renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for group in reversed(groups):
        gathered = t.new_empty((dist.get_world_size(group) * len(t), *t.shape[1:]))
        gather(gathered, t, group=group)
        t = gathered
    return t


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
