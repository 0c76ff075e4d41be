"""The loss inside Hugging Face's SiglipModel and Siglip2Model: ``fuse_loss(model)``, then train as before.

Their ``forward`` always forms the M×N logits. With ``return_loss=True`` a fused model runs the same two towers,
normalises their pooled outputs, and passes them to :func:`siglip_kernels.sigmoid_loss`. Every other call runs their
``forward``. Fusing changes one instance's class, as FSDP2 does: no parameter, no hook, no attribute of the library.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2
from transformers.utils import can_return_tuple

from siglip_kernels.distributed import Exchange
from siglip_kernels.distributed.exchange import exchange_spec
from siglip_kernels.distributed.handshake import propagate_errors
from siglip_kernels.loss import sigmoid_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Model = TypeVar("Model", bound=nn.Module)


def fuse_loss(
    model: Model,
    process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
    *,
    return_logits: bool = False,
) -> Model:
    """Let this instance's ``model(..., return_loss=True)`` form its loss without the logits.

    Parameters, state_dict, ``forward``'s signature and outputs stay theirs: a SiglipOutput or Siglip2Output, or a tuple
    with ``return_dict=False``. The loss has the same value as theirs, and also divides by the batch. In half precision
    it is formed in float32 from the unchanged embeddings, and exp(logit_scale) is not rounded. A call without
    ``return_loss``, such as zero-shot classification, runs the model's own ``forward``.

    Fuse before DDP, torch.compile, a Trainer or an Accelerator wraps the model; before or after ``fully_shard``. Copies
    are fused too, and so are pickles; a model fused with a process group cannot be pickled, for the group is this
    process's own.

    Args:
        model: a SiglipModel or Siglip2Model, or an instance of a subclass with the same ``forward``. A model that is
            already fused takes the arguments of this call.
        process_group: as for :func:`siglip_kernels.sigmoid_loss`: the loss of this rank's images against the texts of
            the whole group. All ranks must call. DDP and FSDP2 then average to the gradients of the joined batch.
        return_logits: whether a call with ``return_loss=True`` also returns ``logits_per_image`` [M, M] and
            ``logits_per_text``, of this rank's pairs; they take their memory. Otherwise both are None; as in theirs, a
            tuple leaves out every None.

    Returns:
        The same model.

    Raises:
        TypeError: another class of model, or a subclass with its own ``forward``.
        ValueError: ``model.forward`` was replaced on this instance. When the model is called: as ``sigmoid_loss``, and
            if the numbers of images and texts differ.
    """
    host = _host(model)
    if not isinstance(model, _Fused):
        cls: Any = type(model)
        if cls.forward is not host.forward:
            raise TypeError(f"model must have the forward of {host.__name__}, but {_class_name(model)} has its own")
        _check_forward(model)
        model.__class__ = _fused_class(cls)
    model._fused_loss = _Settings(process_group, return_logits)  # type: ignore[assignment]
    return model


def unfuse_loss(model: Model) -> Model:
    """Give a model its own loss back. A model that is not fused stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: another class of model.
        ValueError: after ``fuse_loss`` the model was sharded by ``fully_shard``, or its ``forward`` was replaced.
    """
    _host(model)
    if not isinstance(model, _Fused):
        return model
    _check_forward(model)
    if _fused_class(model._host) is not type(model):
        raise ValueError(f"model became a {_class_name(model)} after fuse_loss; expected it as fuse_loss left it")
    model.__class__ = model._host
    del model._fused_loss
    return model


@dataclass(frozen=True)
class _Settings:
    """The arguments of ``fuse_loss``."""

    process_group: Any
    return_logits: bool

    def __deepcopy__(self, memo: Any) -> _Settings:
        """A group belongs to the process: copies of a model share it."""
        return self


class _Fused:
    """The base that a fused model's class has before the model's own class."""

    _host: type  # the class of the model
    _fused_loss: _Settings

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the model's own class: a class made at run time cannot be found by its name."""
        return _restored, (self._host,), super().__reduce_ex__(2)[2]  # __getstate__ is there from Python 3.11


class _FusedSiglip(_Fused):
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        images = {"pixel_values": pixel_values, "interpolate_pos_encoding": interpolate_pos_encoding}
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if return_loss:
            return _with_loss(self, modeling_siglip.SiglipOutput, images, texts, **kwargs)
        return super().forward(**images, **texts, return_loss=return_loss, **kwargs)  # type: ignore[misc]


class _FusedSiglip2(_Fused):
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        images = {
            "pixel_values": pixel_values,
            "pixel_attention_mask": pixel_attention_mask,
            "spatial_shapes": spatial_shapes,
        }
        texts = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if return_loss:
            return _with_loss(self, modeling_siglip2.Siglip2Output, images, texts, **kwargs)
        return super().forward(**images, **texts, return_loss=return_loss, **kwargs)  # type: ignore[misc]


_FUSED: dict[type, type] = {
    modeling_siglip.SiglipModel: _FusedSiglip,
    modeling_siglip2.Siglip2Model: _FusedSiglip2,
}


@can_return_tuple
def _with_loss(model: Any, output: type, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any) -> Any:
    """What their ``forward`` returns with ``return_loss``."""
    settings: _Settings = model._fused_loss
    vision_output = model.vision_model(**images, **kwargs)
    text_output = model.text_model(**texts, **kwargs)
    x, y = _normalize(vision_output.pooler_output), _normalize(text_output.pooler_output)
    if len(x) != len(y):
        _check_batch(len(x), len(y), settings.process_group)
    # A device_map may place the towers on two devices.
    images_there, scale, bias = (t.to(y.device) for t in (x, model.logit_scale, model.logit_bias))
    logits = y @ images_there.T * scale.exp() + bias if settings.return_logits else None
    # In half precision exp would round the scale to eight or eleven bits.
    exact_scale = scale.to(torch.promote_types(scale.dtype, torch.float32)).exp()
    return output(
        loss=sigmoid_loss(images_there, y, exact_scale, bias, process_group=settings.process_group),
        logits_per_image=None if logits is None else logits.T,
        logits_per_text=logits,
        text_embeds=y,
        image_embeds=x,
        text_model_output=text_output,
        vision_model_output=vision_output,
    )


def _normalize(t: Tensor) -> Tensor:
    """Normalise in the dtype of ``t``, as they do: the embeddings are an output too."""
    return t / t.norm(dim=-1, keepdim=True)


def _check_batch(M: int, N: int, process_group: Any) -> None:
    error = ValueError(f"pixel_values hold {M} images, input_ids {N} texts; with return_loss expected as many of both")
    if process_group is None:
        raise error
    with propagate_errors(exchange_spec(process_group).process_groups()):
        raise error


@functools.cache
def _fused_class(cls: type) -> type:
    """A subclass of ``cls`` with its name, which save_pretrained writes, and its module, from which files are read."""
    mixin = next(fused for host, fused in _FUSED.items() if issubclass(cls, host))
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "_host": cls})


def _restored(cls: type) -> Any:
    """An empty instance; pickle and deepcopy then set its state."""
    return object.__new__(_fused_class(cls))


def _host(model: Any) -> Any:
    """The library's class that the model is an instance of."""
    for host in _FUSED:
        if isinstance(model, host):
            return host
    hint = "; give the model that it wraps" if isinstance(model, nn.Module) and _wraps(model) else ""
    raise TypeError(f"model must be a {' or '.join(h.__name__ for h in _FUSED)}, got {_class_name(model)}{hint}")


def _wraps(model: nn.Module) -> bool:
    return any(isinstance(part, tuple(_FUSED)) for part in model.modules())


def _check_forward(model: nn.Module) -> None:
    if "forward" in vars(model):
        raise ValueError(
            "model.forward was replaced on this instance (accelerate does so for mixed precision and device_map); call "
            "fuse_loss before that is done, unfuse_loss after it is undone"
        )


def _class_name(model: Any) -> str:
    cls = type(model)
    return f"{cls.__module__}.{cls.__qualname__}"
