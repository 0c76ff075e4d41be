"""The loss as a module that owns its learnable scale and bias."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from siglip_kernels import backends
from siglip_kernels.loss import Backend, LossArguments, Reduction, sigmoid_loss
from siglip_kernels.stats import LogitStats
from siglip_kernels.validation import REDUCTIONS, one_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11


class SigmoidLoss(nn.Module):
    """:func:`sigmoid_loss` with its two learnable scalars: t = exp(``logit_scale``) and b = ``logit_bias``.

    Args:
        init_logit_scale: initial t, above 0. The parameter ``logit_scale`` [] float32 holds its logarithm.
        init_logit_bias: initial b, the value of the parameter ``logit_bias`` [] float32. None: no bias.
        parameter_shape: shape of both parameters: (), or (1,) for FSDP2, which takes no parameter of shape ().
        reduction: as for :func:`sigmoid_loss`.
        backend: as for :func:`sigmoid_loss`.
        device: of both parameters; None: torch's default device, which is "meta" in a deferred initialisation.

    The parameters are float32 whatever the default dtype is. After ``.half()`` or ``.bfloat16()`` exp is still computed
    in float32. A checkpoint of shape () loads into (1,), and vice versa.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self,
        init_logit_scale: float = 10.0,
        init_logit_bias: float | None = -10.0,
        *,
        parameter_shape: tuple[int, ...] = (),
        reduction: Reduction = "batchmean",
        backend: Backend = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        one_of("reduction", reduction, REDUCTIONS)
        one_of("backend", backend, backends.NAMES)
        if not init_logit_scale > 0:
            raise ValueError(f"init_logit_scale must be above 0, its logarithm is learned; got {init_logit_scale!r}")
        one_of("parameter_shape", parameter_shape, ((), (1,)))
        self.init_logit_scale = float(init_logit_scale)
        self.init_logit_bias = None if init_logit_bias is None else float(init_logit_bias)
        empty = partial(torch.empty, parameter_shape, dtype=torch.float32, device=device)
        self.logit_scale = nn.Parameter(empty())
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(empty())
        self.reset_parameters()
        self.reduction: Reduction = reduction
        self.backend: Backend = backend

    def reset_parameters(self) -> None:
        """Reset scale and bias to their initial values. Deferred initialisation (FSDP) calls it after ``to_empty``."""
        nn.init.constant_(self.logit_scale, math.log(self.init_logit_scale))
        if self.logit_bias is not None and self.init_logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.init_logit_bias)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        *,
        return_stats: bool = False,
        **arguments: Unpack[LossArguments],
    ) -> Tensor | tuple[Tensor, LogitStats]:
        """What :func:`sigmoid_loss` returns. Takes its other keyword arguments."""
        given: LossArguments = {"reduction": self.reduction, "backend": self.backend, **arguments}
        # In half precision exp would round the scale to eight or eleven bits.
        exact = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        return sigmoid_loss(
            image_features, text_features, exact.exp(), self.logit_bias, return_stats=return_stats, **given
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Load a checkpoint's scalars, [] or [1], into this module's shape."""
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape != parameter.shape and saved.shape in ((), (1,)):
                state_dict[prefix + name] = saved.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, backend={self.backend!r}"
