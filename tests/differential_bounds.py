"""The right result of a random call, and how far from it rounding may lead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import denominator, masses, pair_weights
from tests.differential_modes import FEATURES, IDS, WEIGHTS
from tests.kinds import unwrapped

ROUNDINGS = 16  # of float32 or float64 that a term may have seen, beyond those of its logit


@dataclass
class Expected:
    """Of the loss and of each gradient: the value in float64, and the bound on its error in the working precision."""

    values: dict[str, Tensor]
    bounds: dict[str, Tensor]
    stats: tuple[Tensor, ...]


def expected(arguments: dict[str, Any], dtype: torch.dtype) -> Expected:
    """``dtype``: of the features as the loss takes them, which is theirs but for autocast."""
    x, y = (arguments[name].to(dtype).double() for name in FEATURES)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scalars = (arguments["logit_scale"], 0.0 if arguments["logit_bias"] is None else arguments["logit_bias"])
    t, b = (float(torch.as_tensor(s, dtype=torch.float64).to(wide)) for s in scalars)
    pairs = PairSpec(
        *(
            arguments.get(name, 0 if name == "positive_offset" else None)
            for name in ("positive_offset", *IDS, *WEIGHTS)
        ),
        arguments.get("ignore_ids", False),
    )
    u, v = pair_weights(pairs, x, y)
    weight, positive = u[:, None] * v, pairs.positive_mask(len(x), len(y))
    products, sizes = x @ y.T, x.abs() @ y.abs().T
    z = t * products + b
    target, factor = positive.double(), torch.ones_like(z)
    if arguments.get("multi_positive") is not None:
        mass = masses(positive, u, v, arguments.get("anchors", "both")).double()
        if arguments["multi_positive"] == "weights":
            factor = torch.where(positive, mass, 1.0)
        else:
            target = torch.where(positive, mass, 0.0)
    p, smoothing = arguments.get("positive_weight", 1.0), arguments.get("label_smoothing", 0.0)
    target = smoothing + (1 - 2 * smoothing) * target
    ignored = pairs.ignored_mask(*z.shape)
    if ignored is not None:
        factor = factor.masked_fill(ignored, 0.0)
    over = weight * factor / denominator(u, v, arguments["reduction"])
    terms = -over * (p * target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))
    parts = over * (1 - target) * z.sigmoid(), over * p * target * (-z).sigmoid()
    dz, size = parts[0] - parts[1], parts[0] + parts[1]

    eps, tiny = torch.finfo(wide).eps, over.abs() * torch.finfo(wide).tiny  # below it exp may be 0
    of_logit = (4 + len(x[0]) ** 0.5) * eps * (abs(t) * sizes + abs(b))  # a sum of D products, rounded at random
    of_dz = size * (of_logit + ROUNDINGS * eps) + tiny
    rounded = of_dz if dtype is wide else of_dz + size * torch.finfo(dtype).eps
    values = {
        "loss": terms.sum(),
        "image_features": t * dz @ y,
        "text_features": t * dz.T @ x,
        "logit_scale": (dz * products).sum(),
        "logit_bias": dz.sum(),
    }
    bounds = {
        "loss": (size * of_logit + terms * ROUNDINGS * eps + tiny).sum(),
        "image_features": abs(t) * rounded @ y.abs(),
        "text_features": abs(t) * rounded.T @ x.abs(),
        "logit_scale": (of_dz * products.abs() + size * sizes * ROUNDINGS * eps).sum(),
        "logit_bias": of_dz.sum(),
    }
    return Expected(values, bounds, _stats(z, positive, weight, ignored))


def _stats(z: Tensor, positive: Tensor, weight: Tensor, ignored: Tensor | None) -> tuple[Tensor, ...]:
    valid = weight != 0 if ignored is None else (weight != 0) & ~ignored
    found: list[Tensor] = []
    for chosen in (z[positive & valid], z[~positive & valid]):
        extremes = (
            (chosen.amin(), chosen.amax()) if len(chosen) else (torch.tensor(torch.inf), torch.tensor(-torch.inf))
        )
        found += [chosen.mean(), *extremes, torch.tensor(len(chosen))]
    return tuple(found)


def wrong(name: str, got: Any, right: Expected, like: Any) -> str | None:
    """What is wrong with a result, if anything; ``like``: the argument whose dtype and shape its gradient has."""
    value, bound = right.values[name], right.bounds[name]
    got = unwrapped(got).detach()
    if isinstance(like, Tensor):
        if got.dtype is not like.dtype or got.shape != like.shape:
            return f"{name}: {got.dtype} {list(got.shape)}, expected {like.dtype} {list(like.shape)}"
        info = torch.finfo(like.dtype)
        bound = bound + info.eps * value.abs() + info.smallest_normal * info.eps
        value = value.clamp(-info.max, info.max)
    error = (got.double().reshape(value.shape).nan_to_num() - value.nan_to_num()).abs()
    if bool((got.isnan() != value.isnan().reshape(got.shape)).any()) or bool(
        (error > bound.nan_to_num(torch.inf)).any()
    ):
        worst = int((error / bound).nan_to_num().argmax())
        got, value, bound = (s.reshape(-1)[worst].item() for s in (got, value, bound))
        return f"{name}[{worst}]: {got!r}, expected {value!r} within {bound:.2e}"
    return None
