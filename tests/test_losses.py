"""sigmoid_losses: the loss of each image, against float64, on every backend, over ranks; wrong ones are seen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from siglip_kernels import Teacher, backends, sigmoid_loss, sigmoid_losses
from siglip_kernels.backends import comparison, eager
from siglip_kernels.backends.base import BlockTask, Problem
from siglip_kernels.backends.cpu import CpuBlockKernel
from siglip_kernels.distributed import Exchange
from siglip_kernels.gemm import gemm_
from siglip_kernels.loss import Backend
from siglip_kernels.pairs import PairSpec
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import PAIRS, REGIMES, Inputs, make_inputs, relative_l2
from tests.bench.gpu.faulty import needs_interpreter
from tests.distributed.batches import KINDS, Batch, even, of_rank, uneven
from tests.ranks import Ranks, slices

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# More texts than a tile of the CPU's, and no multiple of one.
SHAPE = (130, 700, 48)
LIMITS = {torch.float64: 1e-12, torch.float32: 6e-6}


def arguments_of(kind: str, M: int, N: int) -> dict[str, Any]:
    return {name: value for name, value in PAIRS[kind](M, N, CPU).items() if name != "reduction"}


def gold(inputs: Inputs, **arguments: Any) -> Tensor:
    """The definition in float64: an image's loss is its weight times the derivative of the loss by that weight."""
    M = len(inputs.image_features)
    weights = arguments.pop("image_weights", torch.ones(M)).double().requires_grad_()
    wide = [t.double() for t in inputs]
    total = sigmoid_loss_reference(*wide, **arguments, image_weights=weights, reduction="sum")
    return (torch.autograd.grad(total, weights)[0] * weights).detach()


def assert_right(losses: Tensor, inputs: Inputs, kind: str, regime: str, **arguments: Any) -> None:
    dtype = inputs.image_features.dtype
    assert losses.shape == (len(inputs.image_features),)
    assert losses.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    limit = LIMITS.get(dtype, 2e-5) * (5 if REGIMES[regime].hot else 1)
    assert relative_l2(losses, gold(inputs, **arguments)) <= limit, (dtype, kind, regime)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_against_float64(backend: Backend, kind: str, regime: str) -> None:
    for dtype in DTYPES:
        for shape in ((1, 1, 8), SHAPE):
            arguments = arguments_of(kind, *shape[:2])
            inputs = make_inputs(*shape, dtype, regime, positive_offset=arguments.get("positive_offset") or 0)
            losses = sigmoid_losses(*inputs, **arguments, backend=backend)
            assert_right(losses, inputs, kind, regime, **arguments)
            total = sigmoid_loss(*inputs, **arguments, reduction="sum", backend=backend)
            assert relative_l2(losses.double().sum(), total) <= 1e-6, (dtype, shape)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_tritons_interpreter(dtype: torch.dtype, kind: str) -> None:
    needs_interpreter()
    arguments = arguments_of(kind, 70, 150)
    inputs = make_inputs(70, 150, 24, dtype, "trained", positive_offset=arguments.get("positive_offset") or 0)
    losses = sigmoid_losses(*inputs, **arguments, backend="triton")
    assert_right(losses, inputs, kind, "trained", **arguments)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("kind", ["diagonal", "weights", "soft targets"])
def test_at_every_level_of_the_cpu(level: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CpuBlockKernel(level)
    if reasons := kernel.why_not(Problem(1, 1, 1, torch.float32, CPU)) or kernel.prepare():
        pytest.skip("; ".join(reasons))
    monkeypatch.setitem(backends.BACKENDS, "cpu", kernel)
    for dtype in DTYPES:
        inputs, arguments = make_inputs(*SHAPE, dtype, "trained"), arguments_of(kind, *SHAPE[:2])
        assert_right(sigmoid_losses(*inputs, **arguments, backend="cpu"), inputs, kind, "trained", **arguments)


def test_several_blocks() -> None:
    inputs = make_inputs(2500, 4200, 16, torch.float32, "trained")
    for backend in ("cpu", "eager"):
        losses = sigmoid_losses(*inputs, backend=cast(Backend, backend))
        assert_right(losses, inputs, "diagonal", "trained")


def test_of_the_texts() -> None:
    """By exchanging the sides: transposed, the loss of a text is a column's sum."""
    x, y, t, b = make_inputs(40, 60, 16, torch.float64, "trained", positive_offset=5)
    images, texts = torch.arange(40) % 7, torch.arange(60) % 9
    teacher = Teacher(*make_inputs(40, 60, 8, torch.float64, seed=1), 0.5)
    exchanged = teacher._replace(image_features=teacher.text_features, text_features=teacher.image_features)
    ids: dict[str, Any] = {"ignore_ids": True}
    by_text = sigmoid_losses(y, x, t, b, positive_offset=-5, image_ids=texts, text_ids=images, teacher=exchanged, **ids)
    weights = torch.ones(60, dtype=torch.float64, requires_grad=True)
    total = sigmoid_loss_reference(
        *(x, y, t, b), positive_offset=5, image_ids=images, text_ids=texts, text_weights=weights, teacher=teacher,
        reduction="sum", **ids,
    )  # fmt: skip
    assert relative_l2(by_text, torch.autograd.grad(total, weights)[0]) < 1e-12


def test_training_on_a_selection() -> None:
    """The images of weight 1, which are the hardest, and all texts."""
    x, y, t, b = make_inputs(64, 64, 16, torch.float64, "trained")
    losses = sigmoid_losses(x, y, t, b)
    chosen = torch.zeros(64).index_fill_(0, losses.topk(16).indices, 1.0)
    loss = sigmoid_loss(x, y, t, b, image_weights=chosen)  # over the 16
    torch.testing.assert_close(loss, losses.topk(16).values.sum() / 16, rtol=1e-12, atol=0)


def test_one_product_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    monkeypatch.setattr(eager, "gemm_", lambda *operands: products.append(gemm_(*operands)))
    leaves = [t.requires_grad_() for t in make_inputs(50, 60, 16, torch.float32)]
    losses = sigmoid_losses(*leaves, backend="eager")
    assert len(products) == 1
    assert not losses.requires_grad


def test_compiles_whole() -> None:
    x, y, t, b = make_inputs(20, 30, 8, torch.float32)
    ids = torch.arange(20) % 3, torch.arange(30) % 4

    def losses(x: Tensor, y: Tensor) -> Tensor:
        return sigmoid_losses(x.sin(), y, t, b, image_ids=ids[0], text_ids=ids[1]) * 2

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, y), losses(x, y))


def losses_of_rank(rank: int, group: Any, batch: Batch) -> Tensor:
    own, labels = of_rank(batch, rank)
    return sigmoid_losses(*own, **labels, process_group=Exchange(group, **batch.exchange))


@pytest.mark.parametrize("algorithm", ["ring", "gather"])
@pytest.mark.parametrize("kind", ["diagonal", "weights", *KINDS])
def test_over_ranks(ranks: Ranks, kind: str, algorithm: str) -> None:
    """Against all texts."""
    for batch in (
        even(2, pairs=kind, exchange={"algorithm": algorithm}),
        uneven(3, pairs=kind, exchange={"algorithm": algorithm}),
    ):
        found = ranks.run(batch.world, losses_of_rank, batch)
        for rank, losses in enumerate(found):
            assert relative_l2(losses, joined_losses(batch, rank)) <= 5e-6, (kind, rank)


def joined_losses(batch: Batch, rank: int) -> Tensor:
    """Of the rank's images against all texts, in float64, with the rank's own teachers."""
    inputs = Inputs(*(v.double() for v in batch.inputs()))
    rows, cols = slices(batch.images)[rank], slices(batch.texts)[rank]
    arguments: dict[str, Any] = {**batch.labels(), **KINDS.get(batch.pairs, {})}
    if batch.teachers():
        arguments["teacher"] = [
            t._replace(logit_scale=t.logit_scale / (1 + rank), logit_bias=t.logit_bias + rank) for t in batch.teachers()
        ]
    if "multi_positive" in arguments:
        return gold(inputs, **arguments)[rows]
    # The diagonal is that of the rank's own texts: images beyond them have no positive.
    with_diagonal, without = (
        gold(inputs, **arguments, positive_offset=offset)[rows] for offset in (cols.start - rows.start, None)
    )
    has_text = torch.arange(rows.stop - rows.start) < cols.stop - cols.start
    return torch.where(has_text, with_diagonal, without)


def test_what_is_refused() -> None:
    x, y, t, b = make_inputs(20, 30, 8, torch.bfloat16)
    with pytest.raises(TypeError, match="reduction"):
        sigmoid_losses(x, y, t, b, reduction="sum")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"backend='cuda' cannot run .* the loss of each image is asked for"):
        sigmoid_losses(x, y, t, b, backend="cuda")
    with pytest.raises(ValueError, match="text_ids is given without image_ids"):
        sigmoid_losses(x, y, t, b, text_ids=torch.arange(30))


def of_the_next_image(task: BlockTask) -> None:
    assert task.image_losses is not None
    task.image_losses.copy_(task.image_losses.roll(1))


def without_the_last_tile(task: BlockTask) -> None:
    assert task.image_losses is not None
    kept = task._replace(y=task.y[:-1], pairs=task.pairs._replace(positive_offset=0), sums=task.sums.clone())
    comparison.run_eager(kept)


@pytest.mark.parametrize("fault", [of_the_next_image, without_the_last_tile, None])
def test_a_wrong_kernel_is_seen_at_its_first_block(fault: Callable[[BlockTask], None] | None) -> None:
    x, y, t, b = make_inputs(40, 60, 16, torch.float32, "trained")

    def launch(task: BlockTask) -> None:
        comparison.run_eager(task)
        if fault is not None:
            fault(task)

    task = BlockTask(
        *(x, y, t, b, PairSpec()),
        sums=torch.empty(4, dtype=torch.float64),
        dz=None,
        dz_scale=None,
        workspace=None,
        loss_only=True,
        image_losses=torch.empty(40, dtype=torch.float64),
    )
    error = comparison.errors_of_launch(launch, task)["losses of images"]
    assert error > 1 if fault is not None else error < 0.5, error


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_wrong_loss_of_an_image_is_seen_here(backend: str) -> None:
    inputs = make_inputs(*SHAPE, torch.float32, "trained")
    losses = partial(sigmoid_losses, backend=cast(Backend, backend))(*inputs)
    for wrong in (losses.roll(1), losses * (1 + 2e-5), torch.cat([losses[:-1], losses[-1:] * 0])):
        with pytest.raises(AssertionError):
            assert_right(wrong, inputs, "diagonal", "trained")
