"""The loss behind open_clip's interface: change one import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip_kernels.distributed import Exchange
from siglip_kernels.distributed.exchange import exchange_spec, global_rank_and_size
from siglip_kernels.distributed.handshake import propagate_errors
from siglip_kernels.loss import sigmoid_loss
from siglip_kernels.teachers import Teacher
from siglip_kernels.validation import one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# The algorithm for each of open_clip's names. The results do not depend on it.
ALGORITHMS = {"bidir": "ring", "shift": "ring", "reduce": "gather", "gather": "gather"}


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, ``forward`` and values.

    Args:
        cache_labels: accepted for compatibility; labels are never materialised, so there is nothing to cache.
        rank: of this process in the group; 0 for one process.
        world_size: number of processes in the group.
        dist_impl: "bidir" (None) or "shift": texts travel round a ring, and memory is a few local batches. "reduce" or
            "gather": one all-gather and one reduce-scatter, the fewest messages. The values are the same.
        chunk_size: accepted for compatibility; memory is bounded for every value.
        process_group: a ProcessGroup, a DeviceMesh of one dimension or two (nodes × GPUs of a node), or an
            :class:`~siglip_kernels.distributed.Exchange`, which overrides dist_impl. With a group, rank and world_size
            may be left out. None with world_size above 1: the default group, at the first call.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
    ) -> None:
        super().__init__()
        one_of("dist_impl", dist_impl, (None, *ALGORITHMS))
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size); got rank = {rank!r}, world_size = {world_size!r}")
        if chunk_size < 0:
            raise ValueError(f"chunk_size must be 0 (no chunks) or above; got {chunk_size!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.process_group = process_group
        if process_group is not None and (rank, world_size) == (0, 1):
            self.rank, self.world_size = global_rank_and_size(exchange_spec(self._exchange()).process_groups())

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss over the local batch, divided by its size. With output_dict: ``{"contrastive_loss": loss}``.

        Shapes, dtypes and errors: see :func:`siglip_kernels.sigmoid_loss`. logit_scale is already exponentiated.
        """
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, *inputs: Any, teacher: Sequence[Teacher] | None = None) -> Tensor:
        exchange = self._exchange()
        if self.world_size > 1 and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"world_size = {self.world_size} was given, but torch.distributed.init_process_group was not called"
            )
        if exchange is not None and not torch.compiler.is_compiling():
            groups = exchange_spec(exchange).process_groups()
            with propagate_errors(groups):
                self._check_rank(*global_rank_and_size(groups))
        return sigmoid_loss(*inputs, teacher=teacher, process_group=exchange)

    def _exchange(self) -> Exchange | None:
        if isinstance(self.process_group, Exchange):
            return self.process_group
        if self.process_group is None and self.world_size == 1:
            return None
        return Exchange(self.process_group, ALGORITHMS[self.dist_impl])

    def _check_rank(self, rank: int, world_size: int) -> None:
        if (rank, world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"rank = {self.rank}, world_size = {self.world_size} were given, but this process is rank {rank} of "
                f"{world_size} in the process group"
            )


class DistillSigLipLoss(SigLipLoss):
    """Distillation with a teacher's sigmoid, by the constructor and the call of MobileCLIP2's ``DistillSigLipLoss``.

    The loss is w_0 times the loss of the labels and w_1 times the cross-entropy with the teacher's sigmoid q,

        Σ_ij (q softplus(−z) + (1 − q) softplus(z)) / B

    formed together in one pass. It is least where the student agrees with its teacher. MobileCLIP2's own class has
    Σ softplus(−(2q − 1) z) / B in that place, which is least at infinite logits: unless q is 0 or 1, values differ.

    Args:
        positional: of :class:`SigLipLoss`.
        others: of :class:`SigLipLoss`.
        teacher_dimension: with average_after_sigmoid, the widths of the teachers whose features are side by side.
        distill_loss_weights: (w_0, w_1).
        average_after_sigmoid: average the teachers' sigmoids. Otherwise all features belong to one teacher.
        dist_logit_scale: of the teacher, or one of each; instead of those of the call.
        dist_logit_bias: the same.
    """

    def __init__(
        self,
        *positional: Any,
        teacher_dimension: Sequence[int] = (-1,),
        distill_loss_weights: Sequence[float] = (1.0, 1.0),
        average_after_sigmoid: bool = False,
        dist_logit_scale: Any = None,
        dist_logit_bias: Any = None,
        **others: Any,
    ) -> None:
        super().__init__(*positional, **others)
        if len(distill_loss_weights) != 2 or min(distill_loss_weights) < 0 or sum(distill_loss_weights) == 0:
            raise ValueError(
                f"distill_loss_weights must be two numbers of at least 0, not both 0; got {distill_loss_weights!r}"
            )
        self.teacher_dimension = list(teacher_dimension)
        self.distill_loss_weights = list(distill_loss_weights)
        self.average_after_sigmoid = average_after_sigmoid
        self.dist_logit_scale, self.dist_logit_bias = dist_logit_scale, dist_logit_bias

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        dist_image_features: Tensor,  # [B, D'], detached
        dist_text_features: Tensor,
        dist_logit_scale: Any = None,
        dist_logit_bias: Any = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The sum of both losses; with output_dict, ``{"contrastive_and_distill_loss": loss}``."""
        scales = dist_logit_scale if self.dist_logit_scale is None else self.dist_logit_scale
        biases = dist_logit_bias if self.dist_logit_bias is None else self.dist_logit_bias
        widths = self.teacher_dimension if self.average_after_sigmoid else [dist_image_features.shape[1]]
        parts = dist_image_features.split(widths, 1), dist_text_features.split(widths, 1)
        total = sum(self.distill_loss_weights)
        weight = self.distill_loss_weights[1] / total / len(widths)
        teachers = [
            Teacher(images, texts, 1.0 if scale is None else scale, bias, weight)
            for images, texts, scale, bias in zip(
                *parts, _of_each(scales, len(widths)), _of_each(biases, len(widths)), strict=True
            )
        ]
        loss = total * self._loss(image_features, text_features, logit_scale, logit_bias, teacher=teachers)
        return {"contrastive_and_distill_loss": loss} if output_dict else loss


def _of_each(value: Any, count: int) -> list[Any]:
    """One value of each teacher, from a sequence or from a single one."""
    return list(value) if isinstance(value, list | tuple) else [value] * count
