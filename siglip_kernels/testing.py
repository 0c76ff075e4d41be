"""The gradient checker: input regimes, error measures, and a verdict on any implementation of the loss.

Gold is the definition in float64 on the already rounded inputs. The yardstick is the definition in the features' own
dtype, which people train with today. An implementation must be no worse than that, and also within fixed limits.

    from siglip_kernels.testing import check
    report = check(my_loss, dtypes=[torch.bfloat16], shapes=[(1000, 1500, 768)])
    assert report.ok, report
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels.pairs import ANCHORS
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.teachers import Teacher
from siglip_kernels.terms import Scalars, cancellation, feature_grads_of_rounded_dz, scalar_terms


class Regime(NamedTuple):
    """Where in training the inputs come from."""

    scale: float
    bias: float
    cosine: float  # between the two features of a positive pair
    hot: bool = False  # |z| in the hundreds: the limits for float32 are wider


REGIMES = {
    "init": Regime(10.0, -10.0, 0.1),
    "trained": Regime(117.0, -12.9, 0.15),
    "hot": Regime(900.0, -40.0, 0.05, hot=True),
    "flat": Regime(0.01, 3.0, 0.1),
}
ENOUGH_PAIRS = 1000  # needed for a comparison with eager
HALF = (torch.float16, torch.bfloat16)
# What rounding an exact gradient to its dtype may cost, whatever eager's error is: half a unit, in float32 nearly one.
ROUNDED_GRADIENT = {torch.float32: 1e-7, **{dtype: torch.finfo(dtype).eps / 2 for dtype in HALF}}
# Where eager's rounding came out better by luck, an error may be that of an exact dz rounded once, and a little more.
# With masses, or at a scale near 0, many pairs have one dz, and its rounding does not average out.
ROUNDED_DZ = 1.02
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# (M, N, D): one pair; one image; one below and one above a 128-tile, with D no multiple of 16; several tiles; on each
# side several of every backend's smallest blocks.
SHAPES = ((1, 1, 8), (1, 129, 33), (127, 129, 100), (300, 200, 768), (1100, 2100, 64))


class Limits(NamedTuple):
    """The largest allowed errors, independent of the yardstick."""

    loss: float  # relative
    features: float  # relative L2 of a feature gradient
    scalars: float  # of a scalar gradient, against Σ|terms|


LIMITS = {
    torch.float64: Limits(1e-9, 1e-9, 1e-9),
    torch.float32: Limits(6e-6, 6e-6, 6e-6),
    torch.bfloat16: Limits(2e-5, 3.5e-3, 1e-3),
    torch.float16: Limits(2e-5, 3.5e-3, 1e-3),
}
HOT_FLOAT32_LIMITS = Limits(3e-5, 3e-5, 3e-5)


def limits(dtype: torch.dtype, regime: str) -> Limits:
    return HOT_FLOAT32_LIMITS if dtype is torch.float32 and REGIMES[regime].hot else LIMITS[dtype]


class Inputs(NamedTuple):
    image_features: Tensor  # [M, D]
    text_features: Tensor  # [N, D]
    logit_scale: Tensor  # []
    logit_bias: Tensor  # []


def make_inputs(
    M: int,
    N: int,
    D: int,
    dtype: torch.dtype,
    regime: str = "init",
    *,
    positive_offset: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    drawn_on: torch.device | str = "cpu",
) -> Inputs:
    """Normalised random features, and the regime's scale and bias. Pairs (i, i + positive_offset) have its cosine.

    Scale and bias are float32, or float64 for float64 features. The numbers are the same on every ``device``, because
    they are drawn on the CPU. For the largest batches, drawing on their own device (``drawn_on``) is faster.
    """
    scale, bias, cosine, _ = REGIMES[regime]
    generator = torch.Generator(drawn_on).manual_seed(seed)
    x = F.normalize(torch.randn(M, D, generator=generator, dtype=torch.float32, device=drawn_on), dim=1)
    y = F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float32, device=drawn_on), dim=1)
    images = torch.arange(max(0, -positive_offset), min(M, N - positive_offset), dtype=torch.int64, device=drawn_on)
    texts = images + positive_offset
    across = y[texts] - (y[texts] * x[images]).sum(1, keepdim=True) * x[images]
    y[texts] = cosine * x[images] + math.sqrt(1 - cosine**2) * F.normalize(across, dim=1)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scalars = torch.tensor([scale, bias], dtype=wide, device="cpu").to(device)
    # Copies: a view at byte 4 is not aligned like a parameter, and Triton would compile its kernels again.
    return Inputs(x.to(device, dtype), y.to(device, dtype), *(scalar.clone() for scalar in scalars))


class Grads(NamedTuple):
    """A loss and its gradients, measured or expected."""

    loss: Tensor
    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


# The errors of a Grads, in its order.
COLUMNS = ("loss", "dx", "dy", "dscale", "dbias")


def differentiate(loss_fn: Callable[..., Tensor], inputs: Inputs, upstream: float = 1.0, **arguments: Any) -> Grads:
    """The value of ``loss_fn(*inputs, **arguments)`` and ``upstream`` times its gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = loss_fn(*leaves, **arguments)
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    return Grads(loss.detach(), *grads)


def gold(inputs: Inputs, upstream: float = 1.0, **arguments: Any) -> Grads:
    """The definition, in float64, on exactly these inputs."""
    return differentiate(sigmoid_loss_reference, Inputs(*(t.double() for t in inputs)), upstream, **arguments)


def relative_l2(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖; NaN in ``value`` gives NaN."""
    return _ratio(float((value.double() - expected.double()).norm()), float(expected.double().norm()))


def worst_rows(value: Tensor, expected: Tensor, rows: int = 64) -> float:
    """The largest :func:`relative_l2` over blocks of ``rows`` rows. It shows errors that the whole tensor hides."""
    pairs = zip(value.split(rows), expected.split(rows), strict=True)
    return max((relative_l2(v, e) for v, e in pairs), key=_nan_is_largest, default=0.0)


@dataclass(frozen=True)
class Case:
    """One call to be judged."""

    dtype: torch.dtype
    shape: tuple[int, int, int]  # M, N, D
    regime: str
    pairs: str  # a key of PAIRS

    def __str__(self) -> str:
        M, N, D = self.shape
        return f"{str(self.dtype).removeprefix('torch.')} M={M} N={N} D={D} {self.regime} {self.pairs}"


class Verdict(NamedTuple):
    """A case, its errors by name (loss, dx, dy, dscale, dbias) with their limits, and what is wrong, if anything."""

    case: Case
    errors: dict[str, float]
    limits: dict[str, float]
    failures: list[str]


@dataclass
class Report:
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.verdicts) and not self.failures

    @property
    def failures(self) -> list[str]:
        return [line for verdict in self.verdicts for line in verdict.failures]

    def __str__(self) -> str:
        """The worst errors of each dtype and regime, each beside its fixed limit; then every failure."""
        head = f"{'dtype':<9} {'regime':<8} {'cases':>5}" + "".join(f"{c:>18}" for c in COLUMNS)
        lines = [head + "   (worst error / limit)"]
        groups: dict[tuple[torch.dtype, str], list[Verdict]] = {}
        for v in self.verdicts:
            groups.setdefault((v.case.dtype, v.case.regime), []).append(v)
        for (dtype, regime), verdicts in groups.items():
            worst = {c: max((v.errors[c] for v in verdicts), key=_nan_is_largest) for c in COLUMNS}
            fixed = _by_name(limits(dtype, regime))
            cells = "".join(f"{worst[c]:>10.1e}/{fixed[c]:.1e}" for c in COLUMNS)
            lines.append(f"{str(dtype).removeprefix('torch.'):<9} {regime:<8} {len(verdicts):>5}{cells}")
        return "\n".join([*lines, *(f"FAILED {line}" for line in self.failures)])


def _counted(length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.int64, device=device)


def _weights(length: int, device: torch.device, period: int, unit: float) -> Tensor:
    """1, 2, … in a cycle, with 0 at the end of each period, in float32, times ``unit``."""
    return (_counted(length, device) + 1).remainder(period).to(torch.float32) * unit


# Labels, weights and reductions to try; each takes M, N and the device.
PAIRS: dict[str, Callable[[int, int, torch.device], dict[str, Any]]] = {
    "diagonal": lambda M, N, device: {},
    "offset": lambda M, N, device: {"positive_offset": min(3, N - 1), "reduction": "mean"},
    "no positives": lambda M, N, device: {"positive_offset": None},
    "ids": lambda M, N, device: {
        "image_ids": _counted(M, device) % 61,
        "text_ids": _counted(N, device) % 67,
        "reduction": "sum",
    },
    "weights": lambda M, N, device: {
        "image_weights": _weights(M, device, 4, 0.5),
        "text_weights": _weights(N, device, 3, 1.5),
    },
    "ignore ids": lambda M, N, device: {
        "positive_offset": min(2, N - 1),
        "ignore_ids": True,
        "image_ids": _counted(M, device) % 61,
        "text_ids": _counted(N, device) % 67,
    },
    "multi-positive weights": lambda M, N, device: _multi_positive(M, N, device, "weights"),
    "soft targets": lambda M, N, device: _multi_positive(M, N, device, "soft_targets"),
    "balance": lambda M, N, device: {
        "positive_offset": min(3, N - 1),
        "positive_weight": 2.5,
        "label_smoothing": 0.1,
        "ignore_ids": True,
        "image_ids": _counted(M, device) % 61,
        "text_ids": _counted(N, device) % 67,
    },
    "soft targets, balance": lambda M, N, device: {
        **_multi_positive(M, N, device, "soft_targets"),
        "positive_weight": 0.5,
        "label_smoothing": 0.05,
    },
    "teacher": lambda M, N, device: {"teacher": _teacher(M, N, 24, device, 0.6)},
    "teachers, soft targets, balance": lambda M, N, device: {
        **_multi_positive(M, N, device, "soft_targets"),
        "positive_weight": 2.0,
        "label_smoothing": 0.05,
        "teacher": (_teacher(M, N, 40, device, 0.3), _teacher(M, N, 17, device, 0.5)),
    },
}


def _teacher(M: int, N: int, D: int, device: torch.device, weight: float) -> Teacher:
    return Teacher(*make_inputs(M, N, D, torch.float32, "trained", seed=D, device=device), weight)


def _multi_positive(M: int, N: int, device: torch.device, kind: str) -> dict[str, Any]:
    """Many positives per image: up to two fifths of the texts. Both sides have padding. Anchors vary with the shape."""
    return {
        "multi_positive": kind,
        "anchors": tuple(ANCHORS)[(M + N) % len(ANCHORS)],
        "image_ids": _counted(M, device) % 7,
        "text_ids": _counted(N, device) ** 2 % 5,
        "image_weights": _weights(M, device, 4, 0.5),
        "text_weights": _weights(N, device, 3, 1.5),
        "reduction": "sum" if kind == "weights" else "mean",
    }


def cases(
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    regimes: Sequence[str] = tuple(REGIMES),
    pairs: Sequence[str] = tuple(PAIRS),
) -> Iterator[Case]:
    """Every combination of the arguments."""
    for dtype in dtypes:
        for regime in regimes:
            for shape in shapes:
                for name in pairs:
                    yield Case(dtype, shape, regime, name)


def judge(loss_fn: Callable[..., Tensor], case: Case, device: torch.device | str = "cpu") -> Verdict:
    """Run one case of ``loss_fn``, which takes the arguments of :func:`sigmoid_loss` except ``backend``."""
    device = torch.device(device)
    arguments = PAIRS[case.pairs](*case.shape[:2], device)
    offset = arguments.get("positive_offset") or 0
    inputs = make_inputs(*case.shape, case.dtype, case.regime, positive_offset=offset, device=device)
    expected = gold(inputs, **arguments)
    upstream = _upstream(expected, case.dtype)
    expected = Grads(expected.loss, *(upstream * g for g in expected[1:]))
    terms = scalar_terms(inputs, upstream, **arguments)

    ours = differentiate(loss_fn, inputs, upstream, **arguments)

    admissible = _by_name(limits(case.dtype, case.regime))
    if "teacher" in arguments:  # a student that agrees with it has no dz left
        pairs = {name: value for name, value in arguments.items() if name != "reduction"}
        admissible |= {name: admissible[name] * cancellation(inputs, **pairs) for name in ("dx", "dy")}
    errors = _errors(ours, expected, terms)
    measured = [(name, name, error, admissible[name]) for name, error in errors.items()]
    # With fewer pairs the sample of eager's rounding is too small: it may be exact by luck.
    is_compared = case.dtype in ROUNDED_GRADIENT and math.prod(case.shape[:2]) >= ENOUGH_PAIRS
    features = (("dx", 1), ("dy", 2)) if is_compared else ()
    eager = functools.cache(lambda: _eager(inputs, case.dtype, upstream, **arguments))
    rounded = functools.cache(lambda: feature_grads_of_rounded_dz(*inputs, upstream, **arguments))
    for name, index in features:
        for measure, what in ((relative_l2, "against eager"), (worst_rows, "worst 64 rows against eager")):
            error = measure(ours[index], expected[index])
            bound = ROUNDED_GRADIENT[case.dtype]
            if not error <= bound:  # else eager need not run
                bound = _yardstick(case.dtype, measure(eager()[index], expected[index]))
            if error > bound and case.dtype in HALF:
                bound = max(bound, ROUNDED_DZ * measure(rounded()[index - 1], expected[index]))
            measured.append((name, f"{name}, {what},", error, bound))
    failures = [
        f"{case}: {what} {error:.2e} > {bound:.2e}" + _worst_coordinate(name, ours, expected)
        for name, what, error, bound in measured
        if not error <= bound
    ]
    return Verdict(case, errors, admissible, failures)


def check(
    loss_fn: Callable[..., Tensor],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[Case], None] | None = None,
    **selection: Any,
) -> Report:
    """Judge ``loss_fn`` on :func:`cases` of ``selection``: dtypes, shapes, regimes, pairs.

    ``loss_fn`` takes the arguments of :func:`siglip_kernels.sigmoid_loss` except ``backend``.
    """
    report = Report()
    for case in cases(**selection):
        if progress is not None:
            progress(case)
        report.verdicts.append(judge(loss_fn, case, device))
    return report


def _eager(inputs: Inputs, dtype: torch.dtype, upstream: float, **arguments: Any) -> Grads:
    """The definition in the features' own dtype. Its upstream gradient must itself fit into float16."""
    first = min(upstream, 2.0**15)
    grads = differentiate(sigmoid_loss_reference, Inputs(*(t.to(dtype) for t in inputs)), first, **arguments)
    return Grads(grads.loss, *(g.double() * (upstream / first) for g in grads[1:]))


def _errors(ours: Grads, expected: Grads, terms: Scalars) -> dict[str, float]:
    return {
        "loss": relative_l2(ours.loss, expected.loss),
        "dx": relative_l2(ours.image_features, expected.image_features),
        "dy": relative_l2(ours.text_features, expected.text_features),
        "dscale": _ratio(float((ours.logit_scale - expected.logit_scale).abs()), terms.logit_scale),
        "dbias": _ratio(float((ours.logit_bias - expected.logit_bias).abs()), terms.logit_bias),
    }


def _by_name(limit: Limits) -> dict[str, float]:
    loss, features, scalars = limit
    return {"loss": loss, "dx": features, "dy": features, "dscale": scalars, "dbias": scalars}


def _yardstick(dtype: torch.dtype, eager: float) -> float:
    """The allowed error of a feature gradient; ``eager``: the error of eager in the same dtype."""
    bound = max(eager, ROUNDED_GRADIENT[dtype]) if dtype in HALF else 2 * eager + ROUNDED_GRADIENT[dtype]
    return math.inf if math.isnan(eager) else bound


def _upstream(expected: Grads, dtype: torch.dtype) -> float:
    """An upstream gradient other than 1. For float16 a power of two, as a gradient scaler would choose."""
    if dtype is not torch.float16:
        return 0.375
    largest = float(torch.stack([expected.image_features.abs().max(), expected.text_features.abs().max()]).max())
    return 2.0 ** -math.ceil(math.log2(largest)) if largest > 0 else 1.0


def _worst_coordinate(name: str, ours: Grads, expected: Grads) -> str:
    position = COLUMNS.index(name)
    value, gold_value = ours[position], expected[position]
    difference = (value.double() - gold_value.double()).abs().nan_to_num(math.inf, math.inf)
    index = (
        tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)) if difference.dim() else ()
    )
    return f" at {list(index)}: {float(value[index]):.9g}, expected {float(gold_value[index]):.9g}"


def _ratio(error: float, size: float) -> float:
    return 0.0 if error == 0 else math.inf if size == 0 else error / size


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value
