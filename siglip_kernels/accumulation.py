"""Gradient accumulation with the gradients of the large batch: GradCache (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss does not split into the losses of micro-batches. So every micro-batch is encoded twice. The first
time, without a graph, its features are cached; the loss over all cached features then gives their gradients. The second
time, with a graph, these gradients are sent through it. The towers never hold more than one micro-batch's activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from siglip_kernels.loss import LossArguments, sigmoid_loss
from siglip_kernels.stats import LogitStats

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

T = TypeVar("T")


class Encoded(NamedTuple):
    """The output of ``encode``, with the names that open_clip's models use."""

    image_features: Tensor  # [m, D]
    text_features: Tensor  # [n, D]
    logit_scale: float | Tensor
    logit_bias: float | Tensor | None = None


@overload
def accumulate(
    micro_batches: Iterable[T],
    encode: Callable[[T], tuple[Any, ...] | Mapping[str, Any]],
    *,
    gradient: float | Tensor | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    return_stats: Literal[False] = False,
    **loss_arguments: Unpack[LossArguments],
) -> Tensor: ...
@overload
def accumulate(
    micro_batches: Iterable[T],
    encode: Callable[[T], tuple[Any, ...] | Mapping[str, Any]],
    *,
    gradient: float | Tensor | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    return_stats: Literal[True],
    **loss_arguments: Unpack[LossArguments],
) -> tuple[Tensor, LogitStats]: ...
@overload
def accumulate(
    micro_batches: Iterable[T],
    encode: Callable[[T], tuple[Any, ...] | Mapping[str, Any]],
    *,
    gradient: float | Tensor | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    return_stats: bool,
    **loss_arguments: Unpack[LossArguments],
) -> Tensor | tuple[Tensor, LogitStats]: ...
def accumulate(
    micro_batches: Iterable[T],
    encode: Callable[[T], tuple[Any, ...] | Mapping[str, Any]],
    *,
    gradient: float | Tensor | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    return_stats: bool = False,
    **loss_arguments: Unpack[LossArguments],
) -> Tensor | tuple[Tensor, LogitStats]:
    """One loss over all micro-batches. Adds its gradients to every parameter, as ``loss.backward()`` would.

    They are the gradients of the joined batch, also for scale and bias. The memory is one micro-batch's graph plus all
    inputs and features; the time is one more forward of the towers. Under no_grad it only computes the loss.

    Args:
        micro_batches: the inputs of ``encode``, one after another; their sizes may differ.
        encode: returns (image_features [m, D], text_features [n, D], logit_scale[, logit_bias]), or a mapping with
            these names, as open_clip's models do. logit_scale is already exponentiated. With several micro-batches each
            is encoded twice, with the same random numbers from torch's generators of the CPU and of CUDA devices. Both
            outputs must be the same: dropout is repeated. Batch norm updates its statistics twice.
        gradient: of the loss, as in ``Tensor.backward``: ``scaler.scale(torch.ones(()))`` under a GradScaler. None: 1.
        no_sync: the method of the DistributedDataParallel that ``encode`` runs; every backward except the last runs
            inside it. With static_graph=True torch refuses it. FSDP2 needs none.
        return_stats: as for :func:`sigmoid_loss`.
        loss_arguments: its other arguments: ids, weights and teachers of the joined batch, reduction, backend,
            process_group.

    Returns:
        The loss, a detached scalar; with ``return_stats``, (loss, :class:`~siglip_kernels.LogitStats`).

    Raises:
        TypeError, ValueError: ``micro_batches`` is empty, ``encode`` returned something else, or as ``sigmoid_loss``.
        RuntimeError: features had another shape the second time, or require grad in some micro-batches but not in all.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("micro_batches is empty; expected at least one")
    if len(batches) == 1:
        return _backward(_loss([_encoded(encode(batches[0]))], return_stats, loss_arguments), gradient)
    grad_mode = torch.is_grad_enabled()
    states: list[Any] = []
    cached: list[Encoded] = []
    for batch in batches:
        states.append(_random_state())
        # The first one has a graph, which is dropped at once: it shows what requires grad.
        with no_sync(), torch.set_grad_enabled(grad_mode and not cached):
            encoded = _encoded(encode(batch))
        if not cached:
            needs_grad = [grad_mode and isinstance(t, Tensor) and t.requires_grad for t in encoded]
        encoded = Encoded._make(map(_leaf, encoded, needs_grad))
        cached.append(encoded)
    torch.clear_autocast_cache()  # torch 2.9 would take a weight's cast without a graph again, and lose its gradient

    result = _backward(_loss(cached, return_stats, loss_arguments), gradient)
    for i, batch in enumerate(batches if grad_mode else []):
        with no_sync() if i + 1 < len(batches) else contextlib.nullcontext():
            _restore(states[i])
            encoded = _encoded(encode(batch))
            _check_repeated(i, cached[i], encoded)
            pairs = [(t, g) for t, g in zip(encoded, map(_gradient, cached[i]), strict=True) if g is not None]
            if pairs:
                outputs, gradients = zip(*pairs, strict=True)
                torch.autograd.backward(outputs, gradients)
    return result


def _loss(
    batches: Sequence[Encoded], return_stats: bool, arguments: LossArguments
) -> Tensor | tuple[Tensor, LogitStats]:
    """The loss over the joined micro-batches."""
    # Scale and bias are those of the last one: DistributedDataParallel syncs only the last backward.
    scale, bias = batches[-1].logit_scale, batches[-1].logit_bias
    if len(batches) == 1:
        images, texts = batches[0].image_features, batches[0].text_features
    else:
        images = torch.cat([batch.image_features for batch in batches])
        texts = torch.cat([batch.text_features for batch in batches])
    return sigmoid_loss(images, texts, scale, bias, return_stats=return_stats, **arguments)


def _leaf(value: Any, requires_grad: bool) -> Any:
    """A leaf for the loss. AttributeError if a float replaces a tensor that required grad."""
    return value.detach().requires_grad_(requires_grad) if requires_grad or isinstance(value, Tensor) else value


def _gradient(leaf: Any) -> Tensor | None:
    return leaf.grad if isinstance(leaf, Tensor) else None


def _backward(
    result: Tensor | tuple[Tensor, LogitStats], gradient: float | Tensor | None
) -> Tensor | tuple[Tensor, LogitStats]:
    """Run the backward of what ``sigmoid_loss`` returned, and return it without its graph."""
    loss, stats = result if isinstance(result, tuple) else (result, None)
    if loss.requires_grad:
        loss.backward(None if gradient is None else torch.as_tensor(gradient, dtype=loss.dtype, device=loss.device))
    return loss.detach() if stats is None else (loss.detach(), stats)


def _check_repeated(i: int, before: Encoded, again: Encoded) -> None:
    """Require the same shapes, and grad where the first micro-batch requires it: else gradients would be lost."""
    for name, expected, got in zip(Encoded._fields, map(_kind, before), map(_kind, again), strict=True):
        if got != expected:
            raise RuntimeError(f"encode gave {name} of {got} for micro-batch {i} in the replay; expected {expected}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {list(value.shape)} with requires_grad={value.requires_grad}"
    return f"type {type(value).__name__}"


def _encoded(output: Any) -> Encoded:
    named = output
    if isinstance(output, tuple | list) and len(output) in (3, 4):
        named = dict(zip(Encoded._fields, output, strict=False))
    given: Any = type(output).__name__
    if isinstance(output, tuple | list):
        given += f" of {len(output)}: ({', '.join(type(value).__name__ for value in output)})"
    if isinstance(named, Mapping):
        found = {name: named[name] for name in Encoded._fields if name in named}
        given = {name: type(value).__name__ for name, value in found.items()}
        features = found.get("image_features"), found.get("text_features")
        if all(isinstance(t, Tensor) for t in features) and "logit_scale" in found:
            return Encoded(**found)
    raise TypeError(f"encode must return (image_features, text_features, logit_scale[, logit_bias]), got {given}")


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """The state of the generators that a tower's dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])
