"""How the ranks exchange their texts: the user's argument, its form for the operator, and validation on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from siglip_kernels import validation
from siglip_kernels.distributed.handshake import ALGORITHMS, propagate_errors
from siglip_kernels.request import ExchangeSpec, Request
from siglip_kernels.validation import FEATURE_DTYPES, one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Exchange:
    """How the ranks of a group exchange their texts; the same on every rank.

    Args:
        process_group: a ProcessGroup, a DeviceMesh of one dimension or two (nodes × GPUs of a node), or None for the
            default group. On GPUs, torch.cuda.set_device must have selected this rank's.
        algorithm: "ring" or "gather".
        text_gradient_dtype: the dtype in which text gradients travel; None: float32 (float64 for float64 features).
            Half precision halves that traffic, but rounds the sum on every rank that it passes.
        same_upstream: whether the loss has the same upstream gradient on every rank, as with DDP and a shared
            GradScaler. False allows any upstream gradient, and costs a fourth matrix product: a second exchange forms
            the text gradients in backward, which every rank must call.
    """

    process_group: ProcessGroup | DeviceMesh | None = None
    algorithm: str = "ring"
    text_gradient_dtype: torch.dtype | None = None
    same_upstream: bool = True

    def __post_init__(self) -> None:
        one_of("algorithm", self.algorithm, ALGORITHMS)
        if self.text_gradient_dtype not in (None, *FEATURE_DTYPES):
            raise ValueError(f"text_gradient_dtype must be a floating dtype or None; got {self.text_gradient_dtype!r}")


def validator(process_group: Any) -> Callable[..., Request]:
    """``validation.validate``. Over a group, every rank raises ValueError or TypeError if one does."""
    return validation.validate if process_group is None else partial(_validate_over, exchange_spec(process_group))


def _validate_over(exchange: ExchangeSpec, **arguments: Any) -> Request:
    is_compiling = torch.compiler.is_compiling()
    with contextlib.nullcontext() if is_compiling else propagate_errors(exchange.process_groups()):
        return validation.validate(**arguments, exchange=exchange)


def exchange_spec(process_group: Any) -> ExchangeSpec:
    """The spec for the argument ``process_group``: a group, a mesh or an Exchange."""
    exchange = process_group if isinstance(process_group, Exchange) else Exchange(process_group)
    return ExchangeSpec(
        group_names="\n".join(group.group_name for group in _process_groups(exchange.process_group)),
        algorithm=exchange.algorithm,
        text_gradient_dtype=exchange.text_gradient_dtype,
        same_upstream=exchange.same_upstream,
    )


def global_rank_and_size(groups: Sequence[ProcessGroup]) -> tuple[int, int]:
    """This process's rank over all groups, and their size. Ranks of the last group are adjacent."""
    rank, size = 0, 1
    for group in groups:
        rank = rank * dist.get_world_size(group) + dist.get_rank(group)
        size *= dist.get_world_size(group)
    return rank, size


def _process_groups(given: Any) -> list[ProcessGroup]:
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
