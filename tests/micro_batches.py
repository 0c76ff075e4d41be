"""A small model, its micro-batches, and the gradients of the joined batch."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import relative_l2

Batches = list[tuple[Tensor, Tensor]]
UNEVEN = (3, 8, 1, 5)


class Model(nn.Module):
    """Two small towers, and a scale and a bias, that return what open_clip's models return."""

    def __init__(
        self, shape: tuple[int, ...] = (), dropout: float = 0.0, as_mapping: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        between = nn.BatchNorm1d(16) if norm else nn.Dropout(dropout)
        self.image = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), between, nn.Linear(16, 12))
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 12))
        self.logit_scale = nn.Parameter(torch.full(shape, 1.5))
        self.logit_bias = nn.Parameter(torch.full(shape, -2.0))
        self.as_mapping = as_mapping
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, texts: Tensor) -> Any:
        x, y = (F.normalize(tower(t), dim=-1) for tower, t in ((self.image, images), (self.text, texts)))
        self.calls.append((x.detach(), y.detach()))
        values = (x, y, self.logit_scale.exp(), self.logit_bias)
        names = ("image_features", "text_features", "logit_scale", "logit_bias")
        return dict(zip(names, values, strict=True)) if self.as_mapping else values


def model(**options: Any) -> Model:
    torch.manual_seed(1)
    return Model(**options)


def micro_batches(images: tuple[int, ...], texts: tuple[int, ...] | None = None) -> Batches:
    generator = torch.Generator().manual_seed(0)
    sizes = zip(images, texts or images, strict=True)
    return [(torch.randn(m, 7, generator=generator), torch.randn(n, 5, generator=generator)) for m, n in sizes]


def in_float64(batches: Batches) -> Batches:
    return [(images.double(), texts.double()) for images, texts in batches]


def joined(batches: Batches) -> tuple[Tensor, Tensor]:
    images, texts = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(texts)


def gold(like: Model, batches: Batches, factor: float = 1.0, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss over the joined batch and every parameter's gradient, in float64."""
    right = copy.deepcopy(like).double()
    output = right(*(t.double() for t in joined(batches)))
    loss = sigmoid_loss_reference(*(output.values() if like.as_mapping else output), **arguments)
    (factor * loss).backward()
    return loss.detach(), gradients(right)


def in_one_graph(like: Model, batches: Batches, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every parameter's gradient where each micro-batch has a forward of its own, and all share one backward."""
    right = copy.deepcopy(like).to(dtype)
    x, y, scales, biases = zip(*(right(*(t.to(dtype) for t in batch)) for batch in batches), strict=True)
    sigmoid_loss_reference(torch.cat(x), torch.cat(y), scales[0], biases[0]).backward()
    return gradients(right)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], limit: float = 5e-6) -> None:
    assert found.keys() == right.keys()
    errors = {name: relative_l2(found[name], right[name]) for name in right}
    assert all(error <= limit for error in errors.values()), errors
