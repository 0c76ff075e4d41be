"""The Triton block kernel under the interpreter, against the block materialised in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import gemm
from siglip_kernels.backends import triton as backend
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.triton import TritonBlockKernel, configs
from siglip_kernels.pairs import PairSpec

pytest.importorskip("triton", reason="Triton is not installed")
if torch.cuda.is_available():
    pytest.skip("there is a GPU: the interpreter is off", allow_module_level=True)

from siglip_kernels.backends.triton import kernels, launch

# (M, N, D): one pair; one image, odd D; either side of a 128-tile; several tiles of either configuration.
SHAPES = [(1, 1, 8), (1, 129, 33), (127, 129, 100), (200, 130, 64)]
SHAPE = (127, 129, 100)
DTYPES = [torch.float32, torch.float16]
REGIMES = [(10.0, -10.0), (117.0, -12.9), (900.0, -40.0), (0.01, 3.0), (0.0, 0.0)]
KINDS = ["none", "int64 ids", "weights", "ignore ids", "ignore ids, no diagonal", "masses", "soft targets"]
BALANCES = {"balance": (2.5, 0.1), "smoothing": (1.0, 1e-4), "positive weight": (0.3, 0.0)}
BALANCED = [*(f"{kind}, balance" for kind in ("5", "-1000", *KINDS)), "soft targets, smoothing", "5, positive weight"]
FLOAT16_DZ_SCALE = 2.0**14
# Largest relative errors: of dz by its L2 norm, and of the sums against Σ|terms|.
DZ_LIMIT = {torch.float32: 2e-6, torch.float16: 6e-4}
SUMS_LIMIT = 2e-6
HOT_LIMIT = 3e-5  # |z| in the hundreds, for float32 arithmetic


class Inputs(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor


class Block(NamedTuple):
    """What a block kernel writes, or what it should."""

    sums: Tensor  # [3] float64
    dz: Tensor | None  # [M, N]


def make_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype, regime: tuple[float, float] = REGIMES[0], offset: int = 0
) -> Inputs:
    """Normalised features; the pairs (i, i + offset) are correlated."""
    M, N, D = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, D, generator=generator)
    y = torch.randn(N, D, generator=generator)
    images = torch.arange(max(0, -offset), max(0, -offset, min(M, N - offset)))
    y[images + offset] += 0.2 * x[images]
    scale, bias = torch.tensor(regime).unbind()
    return Inputs(F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype), scale, bias)


def make_pairs(kind: str, M: int, N: int) -> PairSpec:
    generator = torch.Generator().manual_seed(1)
    labels, _, balance = kind.rpartition(", ")
    if balance in BALANCES:
        positive_weight, label_smoothing = BALANCES[balance]
        spec = make_pairs(labels, M, N)._replace(positive_weight=positive_weight, label_smoothing=label_smoothing)
        return spec.prepared(torch.empty(M, 1), torch.empty(N, 1), torch.float32)
    match kind:
        case "none":
            return PairSpec(None)
        case "int32 ids" | "int64 ids":
            dtype = torch.int32 if kind == "int32 ids" else torch.int64
            image_ids, text_ids = (torch.randint(5, (length,), generator=generator, dtype=dtype) for length in (M, N))
            return PairSpec(0, image_ids, text_ids)
        case "weights":
            image_weights, text_weights = (2.5 * torch.rand(length, generator=generator) for length in (M, N))
            image_weights[M // 2] = 0.0
            return PairSpec(0, image_weights=image_weights, text_weights=text_weights)
        case "ignore ids" | "ignore ids, no diagonal":
            ids = make_pairs("int64 ids", M, N)
            return ids._replace(ignore_ids=True, positive_offset=3 if kind == "ignore ids" else None)
        case "masses" | "soft targets":
            ids, weights = make_pairs("int32 ids", M, N), make_pairs("weights", M, N)
            how, anchors = ("weights", "both") if kind == "masses" else ("soft_targets", "texts")
            spec = weights._replace(image_ids=ids.image_ids, text_ids=ids.text_ids, multi_positive=how, anchors=anchors)
            return spec.with_masses(torch.float32)
    return PairSpec(int(kind))


def run_block(
    inputs: Inputs,
    pairs: PairSpec,
    *,
    dz: Tensor | None = None,
    needs_dz: bool = True,
    dz_scale: float | None = None,
    loss_only: bool = False,
) -> Block:
    """The kernel's answer, dz in a buffer of its own with 16-byte aligned rows unless one is given."""
    x, y, scale, bias = inputs
    (M, D), N = x.shape, y.shape[0]
    kernel = TritonBlockKernel()
    problem = Problem(M, N, D, x.dtype, x.device, needs_dz)
    assert kernel.why_not(problem) == []
    if dz is None and needs_dz:
        dz = torch.empty(M, -(-N // 16) * 16, dtype=x.dtype)[:, :N]
    sums = torch.empty(3, dtype=torch.float64)
    task = BlockTask(
        x=x,
        y=y,
        scale=scale,
        bias=bias,
        pairs=pairs,
        sums=sums,
        dz=dz,
        dz_scale=None if dz_scale is None else torch.tensor(dz_scale),
        workspace=kernel.workspace(problem, M, N),
        loss_only=loss_only,
    )
    kernel.block(task)
    return Block(sums, dz)


def gold_terms(inputs: Inputs, pairs: PairSpec) -> tuple[Tensor, Tensor, Tensor]:
    """float64 [M, N] terms of the three sums; the last is dz."""
    x, y, scale, bias = (t.double() for t in inputs)
    u = x @ y.T
    positive = pairs.positive_mask(*u.shape)
    z = scale * u + bias
    label, weights = positive.double(), torch.ones_like(u)
    if pairs.image_weights is not None and pairs.text_weights is not None:
        weights = pairs.image_weights.double()[:, None] * pairs.text_weights.double()
    if pairs.image_masses is not None and pairs.text_masses is not None:
        mass = pairs.image_masses.double()[:, None] + pairs.text_masses.double()
        if pairs.multi_positive == "soft_targets":
            label = label * mass
        else:
            weights = weights * torch.where(positive, mass, 1.0)
    target = pairs.label_smoothing + (1 - 2 * pairs.label_smoothing) * label
    # Not F.softplus, which drops exp(-z) beyond its threshold.
    log1p = torch.log1p(torch.exp(-z.abs()))
    terms = pairs.positive_weight * target * ((-z).clamp(min=0) + log1p) + (1 - target) * (z.clamp(min=0) + log1p)
    dz = (1 - target) * torch.sigmoid(z) - pairs.positive_weight * target * torch.sigmoid(-z)
    ignored = pairs.ignored_mask(*u.shape)
    if ignored is not None:
        weights = weights * ~ignored
    dz = weights * dz
    return weights * terms, dz * u, dz


def assert_right(
    block: Block, inputs: Inputs, pairs: PairSpec, *, dz_scale: float | None = None, limit: float = 0.0
) -> None:
    """Whatever ``block`` has is within the limits, or ``limit`` where that is larger."""
    terms = gold_terms(inputs, pairs)
    for name, value, term in zip(("loss", "dz·u", "dz"), block.sums, terms, strict=True):
        error = float(abs(value - term.sum()) / term.abs().sum().clamp(min=1e-300))
        assert error <= max(SUMS_LIMIT, limit), f"Σ {name} is off by {error:.1e}"
    if block.dz is not None:
        expected = terms[2] * (1.0 if dz_scale is None else dz_scale)
        error = float((block.dz.double() - expected).norm() / expected.norm())
        assert error <= max(DZ_LIMIT[block.dz.dtype], limit), f"dz is off by {error:.1e}"


def default_dz_scale(dtype: torch.dtype) -> float | None:
    return FLOAT16_DZ_SCALE if dtype is torch.float16 else None


@pytest.fixture(params=["large", "small"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every problem on the tiles of one table."""
    monkeypatch.setattr(configs, "MIN_LARGE_TILES", 1 if request.param == "large" else math.inf)
    launch._variant.cache_clear()
    yield request.param
    launch._variant.cache_clear()


@pytest.fixture(params=list(configs.SHARED_MEMORY))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By TMA and by pointers, with the tiles, lanes and stores of each family."""
    monkeypatch.setattr(backend, "architecture", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("tiles", "path")
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    inputs, pairs = make_inputs(shape, dtype), PairSpec()
    dz_scale = default_dz_scale(dtype)
    assert_right(run_block(inputs, pairs, dz_scale=dz_scale), inputs, pairs, dz_scale=dz_scale)


@pytest.mark.parametrize("shape", [SHAPE, (70, 129, 33)])
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["5", "-7", "1000", "-1000", "int32 ids", *KINDS, *BALANCED])
def test_labels_and_weights(kind: str, shape: tuple[int, int, int]) -> None:
    pairs = make_pairs(kind, *shape[:2])
    offset = pairs.positive_offset or 0
    inputs = make_inputs(shape, torch.float32, offset=offset if abs(offset) < min(shape[:2]) else 0)
    assert_right(run_block(inputs, pairs), inputs, pairs)


def test_ids_and_weights_together() -> None:
    M, N, _ = SHAPE
    ids, weights = make_pairs("int64 ids", M, N), make_pairs("weights", M, N)
    pairs = PairSpec(None, ids.image_ids, ids.text_ids, weights.image_weights, weights.text_weights)
    inputs = make_inputs(SHAPE, torch.float16)
    block = run_block(inputs, pairs, dz_scale=FLOAT16_DZ_SCALE / 8)
    assert_right(block, inputs, pairs, dz_scale=FLOAT16_DZ_SCALE / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    [
        *("0", "none", "weights", "ignore ids", "masses", "soft targets"),
        *("ignore ids, balance", "masses, smoothing", "soft targets, balance"),
    ],
)
@pytest.mark.parametrize("regime", REGIMES)
def test_regimes(regime: tuple[float, float], kind: str, dtype: torch.dtype) -> None:
    # (0, 0): every e is 1, and the products of 1 + e must hold.
    inputs, pairs = make_inputs(SHAPE, dtype, regime), make_pairs(kind, *SHAPE[:2])
    dz_scale = None if dtype is torch.float32 else FLOAT16_DZ_SCALE / 8
    block = run_block(inputs, pairs, dz_scale=dz_scale)
    assert_right(block, inputs, pairs, dz_scale=dz_scale, limit=HOT_LIMIT if regime[0] > 500 else 0.0)


@pytest.mark.usefixtures("tiles", "path")
def test_products_hold_where_every_factor_is_two() -> None:
    inputs, pairs = make_inputs((130, 260, 8), torch.float32, (0.0, 0.0)), PairSpec(None)
    block = run_block(inputs, pairs)
    assert_right(block, inputs, pairs)
    assert float(block.sums[0]) == pytest.approx(130 * 260 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "kind", ["0", "int64 ids", "weights", "ignore ids", "soft targets", "0, balance", "soft targets, balance"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("path")
def test_outputs_that_are_not_wanted(kind: str, dtype: torch.dtype) -> None:
    inputs, pairs = make_inputs(SHAPE, dtype), make_pairs(kind, *SHAPE[:2])
    everything = run_block(inputs, pairs)
    without_dz = run_block(inputs, pairs, needs_dz=False)
    assert_right(without_dz, inputs, pairs)
    assert torch.equal(without_dz.sums, everything.sums)
    loss_only = run_block(inputs, pairs, needs_dz=False, loss_only=True)
    assert loss_only.sums[0] == everything.sums[0]


def test_dz_scale_stays_out_of_the_sums() -> None:
    inputs, pairs = make_inputs(SHAPE, torch.float32), PairSpec()
    scaled = run_block(inputs, pairs, dz_scale=64.0)
    assert_right(scaled, inputs, pairs, dz_scale=64.0)
    assert torch.equal(scaled.sums, run_block(inputs, pairs).sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("tiles", "path")
def test_dz_is_written_whole_and_nothing_beside_it(dtype: torch.dtype) -> None:
    M, N, D, width = 70, 130, 64, 160
    inputs, pairs = make_inputs((M, N, D), dtype), PairSpec()
    buffer = torch.full((M + 3, width), math.nan, dtype=dtype)
    dz_scale = default_dz_scale(dtype)
    block = run_block(inputs, pairs, dz=buffer[:M, :N], dz_scale=dz_scale)
    assert_right(block, inputs, pairs, dz_scale=dz_scale)
    assert buffer[:M, N:].isnan().all()
    assert buffer[M:].isnan().all()


@pytest.mark.usefixtures("path")
def test_features_need_not_be_whole_tensors() -> None:
    whole = make_inputs((90, 150, 100), torch.float32)
    # Rows and bases off the multiples that TMA and vector loads want, one at a time and together.
    for columns in (slice(4, 68), slice(0, 64), slice(1, 60)):
        inputs = whole._replace(x=whole.x[7:80, columns], y=whole.y[3:, columns])
        assert_right(run_block(inputs, PairSpec(4)), inputs, PairSpec(4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["0", "weights", "0, balance"])
@pytest.mark.parametrize("side", ["x", "y"])
def test_a_feature_that_is_not_finite_reaches_the_loss(bad: float, kind: str, side: str) -> None:
    inputs, pairs = make_inputs((70, 66, 32), torch.float32), make_pairs(kind, 70, 66)
    getattr(inputs, side)[65, 5] = bad
    assert not run_block(inputs, pairs, needs_dz=False, loss_only=True).sums[0].isfinite()
    block = run_block(inputs, pairs)
    assert not block.sums[0].isfinite()
    assert block.dz is not None
    assert math.isinf(bad) or block.dz[65 if side == "x" else slice(None), 65 if side == "y" else 3].isnan().all()


@pytest.mark.parametrize("kind", ["none", "soft targets"])
def test_infinite_negatives_without_smoothing_add_nothing(kind: str) -> None:
    inputs = make_inputs((70, 66, 32), torch.float32, (10.0, -math.inf))
    pairs = make_pairs(f"{kind}, positive weight", 70, 66)
    if pairs.image_ids is not None:
        pairs = pairs._replace(image_ids=pairs.image_ids + 100)
    block = run_block(inputs, pairs)
    assert block.dz is not None
    assert not block.sums.any()
    assert not block.dz.any()


@pytest.mark.usefixtures("tiles")
def test_bitwise_repeatable() -> None:
    inputs, pairs = make_inputs((200, 130, 64), torch.float32), PairSpec()
    first, second = (run_block(inputs, pairs) for _ in range(2))
    assert torch.equal(first.sums, second.sums)
    assert first.dz is not None
    assert second.dz is not None
    assert torch.equal(first.dz, second.dz)


@pytest.mark.parametrize(("width", "columns"), [(32, slice(None)), (33, slice(None)), (48, slice(1, 33))])
def test_operands_are_aligned(width: int, columns: slice) -> None:
    t = torch.randn(5, width)[:, columns]
    aligned = gemm.pad_to_alignment(t)
    assert aligned.data_ptr() % 16 == aligned.stride(0) % 16 == aligned.shape[1] % 16 == 0
    assert torch.equal(aligned[:, : t.shape[1]], t)
    assert not aligned[:, t.shape[1] :].any()
    assert (aligned.data_ptr() == t.data_ptr()) == (width == 32)


def drop_positives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs.LABELS, "offset", configs.LABELS["none"])
    monkeypatch.setattr(launch, "_constants", launch._constants.__wrapped__)


def repeat_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    quarters = kernels._split_quarters
    monkeypatch.setattr(
        kernels, "_split_quarters", lambda *arguments: (*quarters(*arguments)[:3], quarters(*arguments)[2])
    )


def leave_the_edge_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    # Out of range, float("-inf") becomes a logit of 0.
    monkeypatch.setattr(kernels, "float", lambda text: 0.0, raising=False)


def drop_a_partial_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.sum
    monkeypatch.setattr(launch.torch, "sum", lambda partials, **to: total(partials[:, :-1], **to))


@pytest.mark.parametrize("mutate", [drop_positives, repeat_a_quarter, leave_the_edge_unmasked, drop_a_partial_sum])
def test_a_wrong_kernel_is_noticed(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, pairs = make_inputs(SHAPE, torch.float32), PairSpec()
    assert_right(run_block(inputs, pairs), inputs, pairs)
    with monkeypatch.context() as patch:
        mutate(patch)
        wrong = run_block(inputs, pairs)
    with pytest.raises(AssertionError, match="is off by"):
        assert_right(wrong, inputs, pairs)


@pytest.mark.parametrize("wrong", [PairSpec(1), PairSpec(-1), PairSpec(None)])
def test_wrong_labels_are_noticed(wrong: PairSpec) -> None:
    inputs = make_inputs(SHAPE, torch.float16)
    block = run_block(inputs, wrong, dz_scale=FLOAT16_DZ_SCALE)
    with pytest.raises(AssertionError, match="is off by"):
        assert_right(block, inputs, PairSpec(), dz_scale=FLOAT16_DZ_SCALE)


@pytest.mark.parametrize("kind", ["0, balance", "soft targets, balance"])
@pytest.mark.parametrize("wrong", [{"positive_weight": 1.0}, {"label_smoothing": 0.0}, {"label_smoothing": 0.9}, None])
def test_a_wrong_balance_is_noticed(kind: str, wrong: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, pairs = make_inputs(SHAPE, torch.float32), make_pairs(kind, *SHAPE[:2])
    if wrong is None:  # softplus(-a) is forgotten
        balanced = kernels._balanced
        monkeypatch.setattr(kernels, "_balanced", lambda *arguments: (balanced(*arguments)[0], 0.0))
    block = run_block(inputs, pairs._replace(**(wrong or {})))
    with pytest.raises(AssertionError, match="is off by"):
        assert_right(block, inputs, pairs)
