"""Gradient accumulation whose gradients are those of the large batch: GradCache (Gao et al. 2021, arXiv 2101.06983).

A contrastive loss does not split into the losses of micro-batches. So every micro-batch is encoded twice: first without
a graph, to cache its features; then, once the loss over all cached features has given their gradients, with a graph,
through which those gradients are sent. The towers never hold more than one micro-batch's activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from siglip_kernels.loss import sigmoid_loss

T = TypeVar("T")


class Encoded(NamedTuple):
    """What ``encode`` returned, as open_clip's models do."""

    image_features: Tensor  # [m, D]
    text_features: Tensor  # [n, D]
    logit_scale: float | Tensor
    logit_bias: float | Tensor | None = None


def accumulate(
    micro_batches: Sequence[T],
    encode: Callable[[T], tuple[Any, ...] | Mapping[str, Any]],
    *,
    gradient: float | Tensor | None = None,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    **loss_arguments: Any,
) -> Tensor:
    """One loss over all micro-batches; its gradients are added to every parameter, as ``loss.backward()`` would.

    They are those of the joined batch, the scale's and the bias's too. The memory is that of one micro-batch's graph
    and of all features; the time is one forward of the towers more.

    Args:
        micro_batches: what ``encode`` is given, one after another; their sizes may differ.
        encode: returns (image_features [m, D], text_features [n, D], logit_scale[, logit_bias]), or a mapping with
            these names, as open_clip's models do; logit_scale already exponentiated. It is called twice on each
            micro-batch, with the same random numbers, and must return the same: dropout is repeated, batch norm sees
            every micro-batch twice.
        gradient: of the loss, as in ``Tensor.backward``: ``scaler.scale(torch.ones(()))`` under a GradScaler. None: 1.
        no_sync: of the DistributedDataParallel that ``encode`` runs; every backward but the last is inside.
        loss_arguments: of :func:`sigmoid_loss`: ids and weights of the joined batch, reduction, backend, process_group.

    Returns:
        The loss, a detached scalar.

    Raises:
        TypeError, ValueError: ``micro_batches`` is empty, ``encode`` returned something else, or as ``sigmoid_loss``.
        RuntimeError: a micro-batch's features had another shape the second time.
    """
    if not micro_batches:
        raise ValueError("micro_batches is empty; expected at least one")
    states: list[RandomState] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    for micro_batch in micro_batches:
        states.append(RandomState.now())
        # With a graph, at once dropped, the first tells what requires grad.
        with no_sync(), torch.set_grad_enabled(not images):
            encoded = _encoded(encode(micro_batch))
        if not images:
            wanted = [isinstance(t, Tensor) and t.requires_grad for t in encoded]
        encoded = Encoded(*map(_detached, encoded))
        images.append(encoded.image_features)
        texts.append(encoded.text_features)
    after = RandomState.now()

    joined: tuple[Any, ...] = torch.cat(images), torch.cat(texts), *encoded[2:]
    leaves: list[Any] = [t.requires_grad_() if w else t for t, w in zip(joined, wanted, strict=True)]
    loss = sigmoid_loss(*leaves, **loss_arguments)
    if not any(wanted):
        return loss
    loss.backward(None if gradient is None else torch.as_tensor(gradient, dtype=loss.dtype, device=loss.device))
    dx, dy, *dscalars = (t.grad if w else None for t, w in zip(leaves, wanted, strict=True))
    parts = list(zip(_split(dx, images), _split(dy, texts), strict=True))
    for i, micro_batch in enumerate(micro_batches):
        last = i + 1 == len(micro_batches)
        with contextlib.nullcontext() if last else no_sync():
            states[i].restore()
            encoded = _encoded(encode(micro_batch))
            _check_shape("image_features", i, images[i], encoded.image_features)
            _check_shape("text_features", i, texts[i], encoded.text_features)
            # Scale and bias go with the last: one gradient each, in the backward that DistributedDataParallel syncs.
            gradients = [*parts[i], *dscalars] if last else parts[i]
            pairs = [(t, g) for t, g in zip(encoded, gradients, strict=last) if g is not None]
            if pairs:
                outputs, sent = zip(*pairs, strict=True)
                torch.autograd.backward(outputs, sent)
    after.restore()
    return loss.detach()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _split(gradient: Tensor | None, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(parts) if gradient is None else gradient.split([len(part) for part in parts])


def _check_shape(name: str, i: int, before: Tensor, now: Tensor) -> None:
    if before.shape != now.shape:
        raise RuntimeError(
            f"encode gave {name} of shape {list(before.shape)} for micro-batch {i} at first, and of {list(now.shape)} "
            "when it was encoded again; expected the same"
        )


def _encoded(output: Any) -> Encoded:
    if isinstance(output, Mapping) and {"image_features", "text_features", "logit_scale"} <= output.keys():
        return Encoded(**{name: output[name] for name in Encoded._fields if name in output})
    if isinstance(output, tuple | list) and len(output) in (3, 4):
        return Encoded(*output)
    given = f"a mapping of {sorted(output)}" if isinstance(output, Mapping) else f"{type(output).__name__}"
    raise TypeError(f"encode must return (image_features, text_features, logit_scale[, logit_bias]), got {given}")


class RandomState(NamedTuple):
    """Of the generators that a tower's dropout draws from."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
