"""Random blocks for a half-precision block kernel, and what float64 says of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import stats
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import DZ_ROW_MULTIPLE

# Of Σ|terms|, for the sums of a block.
SUM_TOLERANCE = 1e-6
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # relative, at most
SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}  # subnormal


@dataclass(frozen=True)
class Kind:
    """What a block is asked for, but for its shape."""

    dtype: torch.dtype = torch.bfloat16
    labels: str = "offset"  # "none" | "offset" | "ids" | "ignore"
    weights: bool = False
    masses: str | None = None  # a value of multi_positive
    output: str = "dz"  # "dz" | "sums" | "loss"
    with_stats: bool = False
    float32_dz: bool = False


def random_task(choose: random.Random, kind: Kind, M: int, N: int, D: int) -> BlockTask:
    """A block of that kind with an uninitialised (NaN) output. Its inner products are exact in float32."""
    generator = torch.Generator().manual_seed(choose.getrandbits(32))
    x, y = (_features(generator, rows, D, kind.dtype) for rows in (M, N))
    operand = torch.float32 if kind.float32_dz else kind.dtype
    row = -(-N // DZ_ROW_MULTIPLE) * DZ_ROW_MULTIPLE
    dz = torch.full((M, row), torch.nan, dtype=operand)[:, :N] if kind.output == "dz" else None
    scaled = dz is not None and operand is torch.float16
    return BlockTask(
        x=x.to(operand),
        y=y.to(operand),
        scale=torch.tensor(choose.choice([0.5, 4.0, 10.0, 20.0])),
        bias=torch.tensor(choose.choice([-12.0, -10.0, -3.0, 0.0, 2.0])),
        pairs=_pairs(choose, generator, kind, M, N).prepared(x, y, torch.float32),
        sums=torch.full((4,), torch.nan, dtype=torch.float64),
        dz=dz,
        dz_scale=torch.tensor(2.0**10) if scaled else None,
        workspace=None,
        loss_only=kind.output == "loss",
        stats=torch.full((stats.SIZE,), torch.nan, dtype=torch.float64) if kind.with_stats else None,
    )


def mismatch(task: BlockTask) -> str | None:
    """What differs from float64 by more than rounding; None if nothing does."""
    z, u, loss, dz, weight_of_loss = _exact(task)
    M, N = z.shape
    expected = {"loss": loss, "dz·u": dz * u, "dz": dz}
    for index, (name, terms) in enumerate(expected.items()):
        if index and task.loss_only:
            break
        right, bound = terms.sum().item(), SUM_TOLERANCE * terms.abs().sum().item() + 1e-30
        if not abs(task.sums[index].item() - right) <= bound:
            return f"Σ {name}: {task.sums[index].item()!r}, expected {right!r} ± {bound:.1e}"
    if task.dz is not None and (found := _dz_mismatch(task, dz)):
        return found
    if task.stats is not None:
        right = torch.empty_like(task.stats)
        stats.measure_logits(z, task.pairs, right)
        # Sums of logits cancel; counts, minima and maxima are exact but for the rounding of a logit.
        bound = 1e-6 * (1 + z.abs().sum())
        wrong = ~((task.stats == right) | ((task.stats - right).abs() <= bound))
        if wrong.any():
            return f"stats {task.stats.tolist()}, expected {right.tolist()}"
    return None


def _dz_mismatch(task: BlockTask, exact: Tensor) -> str | None:
    dz = task.dz
    assert dz is not None
    right = exact if task.dz_scale is None else exact * task.dz_scale.double()
    bound = (HALF_ULP[dz.dtype] + 4e-6) * right.abs() + SMALLEST[dz.dtype]
    wrong = ~((dz.double() - right).abs() <= bound)
    if wrong.any():
        i, j = wrong.nonzero()[0].tolist()
        return f"dz[{i}, {j}] = {dz[i, j].item()!r}, expected {right[i, j].item()!r}; {int(wrong.sum())} of {wrong.numel()}"
    N = dz.shape[1]
    whole = torch.as_strided(dz, (dz.shape[0], dz.stride(0)), dz.stride())
    if not whole[:, -(-N // 8) * 8 :].isnan().all():
        return "the padding of dz is written beyond the last 16 bytes of a row"
    return None


def _exact(task: BlockTask) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    """[M, N] float64: z, u, and the terms of the loss and of dz."""
    u = task.x.double() @ task.y.double().T
    z = u * task.scale.double() + task.bias.double()
    pairs = task.pairs
    M, N = z.shape
    positive = pairs.positive_mask(M, N, z.device)
    sign = torch.where(positive, 1.0, -1.0).double()
    target = positive.double()
    weight = torch.ones_like(z)
    if pairs.image_weights is not None and pairs.text_weights is not None:
        weight = pairs.image_weights.double()[:, None] * pairs.text_weights.double()[None, :]
    if pairs.image_masses is not None and pairs.text_masses is not None:
        mass = torch.where(positive, pairs.image_masses.double()[:, None] + pairs.text_masses.double()[None, :], 1.0)
        if pairs.multi_positive == "weights":
            weight = weight * mass
        else:
            target = torch.where(positive, mass, 0.0)
    ignored = pairs.ignored_mask(M, N)
    if ignored is not None:
        weight = weight.masked_fill(ignored, 0.0)
    loss = weight * (target * F.softplus(-z, threshold=1e9) + (1 - target) * F.softplus(z, threshold=1e9))
    dz = weight * torch.where(
        target == 1, -torch.sigmoid(-z), torch.where(target == 0, torch.sigmoid(z), torch.sigmoid(z) - target)
    )
    del sign
    return z, u, loss, dz, None


def _features(generator: torch.Generator, rows: int, D: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/8 up to 1/2, few of them not zero, so that products stay near 1 and their sums are exact."""
    values = torch.randint(-4, 5, (rows, D), generator=generator) / 8
    kept = torch.rand(rows, D, generator=generator) < min(1.0, 24 / max(D, 1))
    return (values * kept).to(dtype)


def _pairs(choose: random.Random, generator: torch.Generator, kind: Kind, M: int, N: int) -> PairSpec:
    offset: int | None = None
    if kind.labels in ("offset", "ignore"):
        offset = choose.choice([0, 0, choose.randint(-M, N), choose.randint(1 - M, N - 1)])
    spec = PairSpec(positive_offset=offset)
    if kind.labels in ("ids", "ignore"):
        ids = {
            side: torch.randint(0, max(2, M // 2), (rows,), generator=generator)
            for side, rows in (("image_ids", M), ("text_ids", N))
        }
        spec = spec._replace(**ids, ignore_ids=kind.labels == "ignore")
    if kind.weights:
        weights = (torch.rand(rows, generator=generator) * 2 for rows in (M, N))
        image, text = (w * (torch.rand(w.shape, generator=generator) > 0.1) for w in weights)
        spec = spec._replace(image_weights=image, text_weights=text)
    return spec._replace(multi_positive=kind.masses)


def random_shape(choose: random.Random, largest: int = 400) -> tuple[int, int, int]:
    """(M, N, D): ragged, or whole tiles, or next to them. D is a multiple of 8, as the schedule pads it."""

    def side() -> int:
        return choose.choice([choose.randint(1, largest), choose.choice([1, 64, 127, 128, 129, 256, 257])])

    return side(), side(), 8 * choose.choice([1, choose.randint(1, 50), 8, 9, 16, 40])


__all__ = ["Any", "Kind", "mismatch", "random_shape", "random_task", "replace"]
