"""Random blocks for a half-precision block kernel, and what float64 says of them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import stats
from siglip_kernels.backends.base import BlockTask
from siglip_kernels.pairs import PairSpec
from siglip_kernels.schedule import DZ_ROW_MULTIPLE
from siglip_kernels.teachers import TeacherLogits

SUM_TOLERANCE = 1e-6  # of Σ|terms|
# Relative and absolute rounding of dz, at most.
HALF_ULP = {torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25), torch.float32: (0.0, 2.0**-150)}
# Beside it, the float32 arithmetic of one pair.
PAIR_TOLERANCE = 4e-6
PIECE = 8  # elements that TMA stores at once
Outcome = tuple[str, str | None]  # what was run, and what is wrong with it


@dataclass(frozen=True)
class Kind:
    """What a block is asked for, but for its shape."""

    dtype: torch.dtype = torch.bfloat16
    labels: str = "offset"  # "none" | "offset" | "ids" | "ignore"
    weights: bool = False
    masses: str | None = None  # of pairs.MULTI_POSITIVE
    output: str = "dz"  # "dz" | "float32 dz" | "sums" | "loss"
    stats: bool = False
    balance: bool = False  # positive_weight and label_smoothing
    teacher: bool = False
    by_image: bool = False  # the loss of each image; only with the output "loss"


def random_task(choose: random.Random, kind: Kind, M: int, N: int, D: int) -> BlockTask:
    """A block of that kind with outputs of NaN and without a workspace. Its inner products are exact in float32."""
    generator = torch.Generator().manual_seed(choose.getrandbits(32))
    x, y = (_features(generator, rows, D, kind.dtype) for rows in (M, N))
    row = -(-N // DZ_ROW_MULTIPLE) * DZ_ROW_MULTIPLE
    # For few pairs the schedule widens the features and wants dz in float32.
    operand = torch.float32 if kind.output == "float32 dz" else kind.dtype
    dz = torch.full((M, row), torch.nan, dtype=operand)[:, :N] if "dz" in kind.output else None
    image_losses = torch.full((M,), torch.nan, dtype=torch.float64) if kind.by_image else None
    return BlockTask(
        x=x.to(operand),
        y=y.to(operand),
        scale=torch.tensor(choose.choice([0.5, 4.0, 10.0, 20.0])),
        bias=torch.tensor(choose.choice([-12.0, -10.0, -3.0, 0.0, 2.0, 5.0])),
        pairs=_pairs(choose, generator, kind, M, N).prepared(x, y, torch.float32),
        sums=torch.full((4,), torch.nan, dtype=torch.float64),
        dz=dz,
        dz_scale=torch.tensor(2.0**10) if dz is not None and operand is torch.float16 else None,
        workspace=None,
        loss_only=kind.output == "loss",
        stats=torch.full((stats.SIZE,), torch.nan, dtype=torch.float64) if kind.stats else None,
        teacher=_teacher(choose, generator, M, N) if kind.teacher else None,
        image_losses=image_losses,
    )


def first_failure(outcomes: Iterable[Outcome]) -> str | None:
    """The first block for which something is wrong, and what."""
    return next((f"{what}: {wrong}" for what, wrong in outcomes if wrong is not None), None)


def tensors_of(task: BlockTask) -> list[Tensor]:
    """Every tensor that a kernel may access for the block, but for its workspace."""
    return [value for value in (*task, *task.pairs, *(task.teacher or ())) if isinstance(value, Tensor)]


def random_shape(choose: random.Random, largest: int = 400) -> tuple[int, int, int]:
    """(M, N, D): ragged, whole tiles, or next to them. D is a multiple of 8, as the schedule pads it."""

    def side() -> int:
        return choose.choice([choose.randint(1, largest), choose.choice([1, 64, 127, 128, 129, 256, 257])])

    return side(), side(), 8 * choose.choice([1, choose.randint(1, 50), 8, 9, 16, 40])


def mismatch(task: BlockTask) -> str | None:
    """What differs from float64 by more than rounding; None if nothing does."""
    z, terms = exact_terms(task)
    for index, (name, (term, size)) in enumerate(terms.items()):
        right, bound = term.sum().item(), SUM_TOLERANCE * size.sum().item() + 1e-30
        found = task.sums[index].item()
        if not abs(found - right) <= bound:
            return f"Σ {name}: {found!r}, expected {right!r} ± {bound:.1e}"
        if task.loss_only:
            break
    if (found := task.image_losses) is not None:
        of_images = terms["loss"][0].sum(1)
        wrong = ~((found - of_images).abs() <= PAIR_TOLERANCE * of_images + 1e-30)
        if wrong.any():
            return f"losses of images {wrong.nonzero().flatten().tolist()[:5]}: {int(wrong.sum())} of {len(found)}"
    return _dz_mismatch(task, *terms["dz"]) or _stats_mismatch(task, z)


def exact_terms(task: BlockTask) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """[M, N] float64 each: the logits, the terms of the three sums, and the terms' sizes: |a| + |b| of a term a - b."""
    u = task.x.double() @ task.y.double().T
    z, pairs = u * task.scale.double() + task.bias.double(), task.pairs
    positive, ignored = pairs.positive_mask(*z.shape, z.device), pairs.ignored_mask(*z.shape)
    target, weight = positive.double(), torch.ones_like(z)
    if pairs.image_weights is not None and pairs.text_weights is not None:
        weight = pairs.image_weights.double()[:, None] * pairs.text_weights.double()[None, :]
    if pairs.image_masses is not None and pairs.text_masses is not None:
        mass = pairs.image_masses.double()[:, None] + pairs.text_masses.double()[None, :]
        if pairs.multi_positive == "weights":
            weight = torch.where(positive, weight * mass, weight)
        else:
            target = torch.where(positive, mass, target)
    if ignored is not None:
        weight = weight.masked_fill(ignored, 0.0)
    target = pairs.label_smoothing + (1 - 2 * pairs.label_smoothing) * target
    rest = 1 - target
    if (teacher := task.teacher) is not None:
        taught = teacher.products.double() * teacher.scale.double() + teacher.bias.double()
        kept = 1 - teacher.weight  # the rest to 1 by a sigmoid of its own: even in float64 1 - target would cancel
        target = kept * target + teacher.weight * torch.sigmoid(taught)
        rest = kept * rest + teacher.weight * torch.sigmoid(-taught)
    as_negative, as_positive = weight * rest, weight * target * pairs.positive_weight
    loss = as_negative * F.softplus(z, threshold=1e9) + as_positive * F.softplus(-z, threshold=1e9)
    negative_part, positive_part = as_negative * torch.sigmoid(z), as_positive * torch.sigmoid(-z)
    dz, size = negative_part - positive_part, negative_part + positive_part
    return z, {"loss": (loss, loss), "dz·u": (dz * u, size * u.abs()), "dz": (dz, size)}


def _dz_mismatch(task: BlockTask, exact: Tensor, size: Tensor) -> str | None:
    dz = task.dz
    if dz is None:
        return None
    scale = 1.0 if task.dz_scale is None else task.dz_scale.double()
    right, slack = exact * scale, PAIR_TOLERANCE * size * scale
    relative, absolute = HALF_ULP[dz.dtype]
    wrong = ~((dz.double() - right).abs() <= relative * right.abs() + slack + absolute)
    if wrong.any():
        i, j = wrong.nonzero()[0].tolist()
        return (
            f"dz[{i}, {j}] = {dz[i, j].item()!r}, expected {right[i, j].item()!r}; {int(wrong.sum())} of {dz.numel()}"
        )
    whole_rows = torch.as_strided(dz, (dz.shape[0], dz.stride(0)), dz.stride())
    if not whole_rows[:, -(-dz.shape[1] // PIECE) * PIECE :].isnan().all():
        return "dz is written beyond the last 16 bytes of a row"
    return None


def _stats_mismatch(task: BlockTask, z: Tensor) -> str | None:
    if task.stats is None:
        return None
    right = torch.empty_like(task.stats)
    stats.measure_logits(z, task.pairs, right)
    # Sums of logits cancel. A minimum is exact but for the rounding of one logit.
    bound = SUM_TOLERANCE * (1 + z.abs().sum())
    wrong = ~((task.stats == right) | ((task.stats - right).abs() <= bound))
    return f"stats {task.stats.tolist()}, expected {right.tolist()}" if wrong.any() else None


def _features(generator: torch.Generator, rows: int, D: int, dtype: torch.dtype) -> Tensor:
    """Multiples of 1/8 up to 1/2, about 24 in a row that are not 0: inner products near 1, exact in float32."""
    values = torch.randint(-4, 5, (rows, D), generator=generator) / 8
    return (values * (torch.rand(rows, D, generator=generator) < 24 / D)).to(dtype)


def _teacher(choose: random.Random, generator: torch.Generator, M: int, N: int) -> TeacherLogits:
    """Products near 1 in a matrix whose rows are padded, with NaN, and logits up to 40."""
    products = torch.full((M, -(-N // DZ_ROW_MULTIPLE) * DZ_ROW_MULTIPLE), torch.nan)[:, :N]
    products.copy_(torch.randint(-8, 9, (M, N), generator=generator) / 8)
    scale, bias = choose.choice([0.5, 10.0, 40.0]), choose.choice([-10.0, -2.0, 0.0, 3.0])
    return TeacherLogits(products, torch.tensor(scale), torch.tensor(bias), choose.choice([0.25, 0.9, 1.0]))


def _pairs(choose: random.Random, generator: torch.Generator, kind: Kind, M: int, N: int) -> PairSpec:
    spec = PairSpec(positive_offset=None, multi_positive=kind.masses)
    if kind.labels in ("offset", "ignore"):
        # Also offsets that make no pair positive.
        offset = choose.choice([0, choose.randint(-M, N), choose.randint(1 - M, N - 1)])
        spec = spec._replace(positive_offset=offset)
    if kind.labels in ("ids", "ignore"):
        # Many matches or few; ids that differ in their upper halves alone.
        most, unit = choose.choice([(max(2, M // 2), 1), (8 * M, 1), (max(2, M // 2), 2**32)])
        image, text = (unit * torch.randint(0, most, (rows,), generator=generator) for rows in (M, N))
        spec = spec._replace(image_ids=image, text_ids=text, ignore_ids=kind.labels == "ignore")
    if kind.weights:
        image, text = (2 * torch.rand(rows, generator=generator) for rows in (M, N))
        image[torch.rand(M, generator=generator) < 0.1] = 0  # padding
        spec = spec._replace(image_weights=image, text_weights=text)
    if kind.balance:
        positive_weight, label_smoothing = choose.choice(
            [(0.25, 0.0), (1.0, 1e-3), (3.0, 0.1), (10.0, 0.05), (0.0, 1.0)]
        )
        spec = spec._replace(positive_weight=positive_weight, label_smoothing=label_smoothing)
    return spec
