"""How results of the loss are compared with gold."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

import siglip_kernels
from siglip_kernels import sigmoid_loss
from siglip_kernels.testing import COLUMNS, Inputs, Limits, gold, limits, relative_l2, scalar_terms

loss_fn = partial(sigmoid_loss, backend="eager")
loss_and_grads = partial(siglip_kernels.sigmoid_loss_and_grads, backend="eager")
FLOAT64 = Limits(1e-12, 1e-12, 1e-12)
HALF = (torch.float16, torch.bfloat16)
NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")


def worst(value: Tensor, expected: Tensor) -> str:
    """The coordinate where they differ most, with both values."""
    difference = (value.double() - expected.double()).abs().nan_to_num(math.inf, math.inf)
    if not difference.numel():
        return "empty"
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f"at {list(index)}: {float(value[index]):.9g}, expected {float(expected[index]):.9g}"


def assert_matches(
    ours: Any, inputs: Inputs, what: str, limit: Limits, upstream: float = 1.0, **arguments: Any
) -> None:
    """Relative errors of the loss and of the four gradients within ``limit``; dscale and dbias against Σ|terms|."""
    expected = gold(inputs, upstream, **arguments)
    terms = scalar_terms(inputs, upstream, **arguments)
    errors = [relative_l2(value, right) for value, right in zip(ours[:3], expected[:3], strict=True)]
    for value, right, size in zip(ours[3:], expected[3:], terms, strict=True):
        difference = float((value.double().reshape(()) - right.reshape(())).abs())
        errors.append(difference / size if size else difference)
    bounds = (limit.loss, limit.features, limit.features, limit.scalars, limit.scalars)
    failures = [
        f"{what}: {name} {error:.2e} > {bound:.2e} {worst(value.reshape(right.shape), right)}"
        for name, error, bound, value, right in zip(COLUMNS, errors, bounds, ours, expected, strict=True)
        if not error <= bound
    ]
    assert not failures, "\n".join(failures)


def tight(dtype: torch.dtype, regime: str = "init") -> Limits:
    return FLOAT64 if dtype is torch.float64 else limits(dtype, regime)
