"""One call of the loss as a value. It is validated once; operator, schedule and process group take it whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from siglip_kernels.pairs import PairSpec
from siglip_kernels.teachers import from_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The public names of a request's tensors, in the order of Request.tensors.
TENSOR_NAMES = (
    *("image_features", "text_features", "logit_scale", "logit_bias"),
    *("image_ids", "text_ids", "image_weights", "text_weights"),
)
TEACHER_TENSORS = ("image_features", "text_features", "logit_scale", "logit_bias")  # of every teacher, after those


class ExchangeSpec(NamedTuple):
    """:class:`~siglip_kernels.distributed.Exchange` in a form that an operator's schema can hold: groups by name."""

    group_names: str = ""  # one a line. No name: one process; two: the group across nodes, then that within the node
    algorithm: str = "ring"
    text_gradient_dtype: torch.dtype | None = None
    same_upstream: bool = True

    def process_groups(self) -> list[ProcessGroup]:
        from torch.distributed.distributed_c10d import _resolve_process_group

        return [_resolve_process_group(name) for name in self.group_names.splitlines()]  # type: ignore[arg-type]


ONE_PROCESS = ExchangeSpec()


class NeedsGrad(NamedTuple):
    """Which arguments need a gradient."""

    x: bool = True
    y: bool = True
    scale: bool = True
    bias: bool = True

    @property
    def dz(self) -> bool:
        """Whether dz itself is needed, not only its sums."""
        return self.x or self.y

    @property
    def any(self) -> bool:
        return self.x or self.y or self.scale or self.bias


NO_GRAD = NeedsGrad(x=False, y=False, scale=False, bias=False)


class Request(NamedTuple):
    """The arguments of :func:`siglip_kernels.sigmoid_loss` or ``sigmoid_losses``, validated."""

    x: Tensor  # [M, D] image features, already in the autocast dtype
    y: Tensor  # [N, D] text features
    scale: Tensor  # one element, any floating dtype
    bias: Tensor | None  # the same
    pairs: PairSpec = PairSpec()
    reduction: str = "batchmean"
    backend: str = "auto"
    return_stats: bool = False
    exchange: ExchangeSpec = ONE_PROCESS
    by_image: bool = False  # the loss of each image, and no gradient

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of :meth:`tensor_names`."""
        pairs = self.pairs
        labels = pairs.image_ids, pairs.text_ids, pairs.image_weights, pairs.text_weights
        return self.x, self.y, self.scale, self.bias, *labels, *(t for teacher in pairs.teachers for t in teacher[:4])

    def tensor_names(self) -> tuple[str, ...]:
        """The public names of :meth:`tensors`."""
        teachers = self.pairs.teachers
        return TENSOR_NAMES + tuple(f"teacher: {name}" for _ in teachers for name in TEACHER_TENSORS)

    def with_tensors(self, tensors: Sequence[Any]) -> Request:
        """The same call with other tensors, in the order of :meth:`tensors`."""
        x, y, scale, bias, image_ids, text_ids, image_weights, text_weights, *of_teachers = tensors
        pairs = self.pairs._replace(
            image_ids=image_ids,
            text_ids=text_ids,
            image_weights=image_weights,
            text_weights=text_weights,
            teachers=from_tensors(of_teachers, (teacher.weight for teacher in self.pairs.teachers)),
        )
        return self._replace(x=x, y=y, scale=scale, bias=bias, pairs=pairs)
