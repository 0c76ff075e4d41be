"""The loss behind open_clip's interface: change one import."""

from __future__ import annotations

from torch import Tensor, nn

from siglip_kernels.loss import sigmoid_loss
from siglip_kernels.validation import one_of

DIST_IMPLS = (None, "bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, ``forward`` and values.

    Args:
        cache_labels: accepted for compatibility; labels are never materialised, so there is nothing to cache.
        rank: of this process; 0 for one process.
        world_size: number of processes. This version of siglip_kernels computes the loss of one process.
        dist_impl: None, "bidir", "shift", "reduce" or "gather"; of no effect with one process.
        chunk_size: accepted for compatibility; memory is bounded whatever it is.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        one_of("dist_impl", dist_impl, DIST_IMPLS)
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size); got rank = {rank!r}, world_size = {world_size!r}")
        if chunk_size < 0:
            raise ValueError(f"chunk_size must be 0 (no chunks) or above; got {chunk_size!r}")
        if world_size > 1:
            raise ValueError(
                f"world_size = {world_size}: this version of siglip_kernels computes the loss of one process only; "
                "the exchange between processes is not there yet"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss over the local batch, divided by its size; ``{"contrastive_loss": loss}`` with output_dict.

        Shapes, dtypes and errors are as for :func:`siglip_kernels.sigmoid_loss`; logit_scale is already exponentiated.
        """
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
