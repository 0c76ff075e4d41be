"""DistillSigLipLoss: its value written out, with one teacher and with several, over ranks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_kernels import DistillSigLipLoss, SigLipLoss
from siglip_kernels.testing import make_inputs, relative_l2
from tests.ranks import Ranks, slices

B = 40
WEIGHTS = (0.7, 1.9)


def student(dtype: torch.dtype = torch.float64, rows: int = B) -> list[Tensor]:
    return [t.requires_grad_() for t in make_inputs(rows, rows, 24, dtype, "trained")]


def teachers(widths: tuple[int, ...], rows: int = B) -> list[tuple[Tensor, ...]]:
    return [tuple(make_inputs(rows, rows, D, torch.float64, "trained", seed=D)) for D in widths]


def sigmoid_of(members: list[tuple[Tensor, ...]]) -> Tensor:
    """The mean of the teachers' sigmoids."""
    return torch.stack([(t * x @ y.T + b).sigmoid() for x, y, t, b in members]).mean(0)


def written_out(inputs: list[Tensor], q: Tensor, weights: tuple[float, float] = WEIGHTS) -> Tensor:
    x, y, t, b = inputs
    z = t * x @ y.T + b
    labels = -F.logsigmoid((2 * torch.eye(len(x), dtype=z.dtype) - 1) * z).sum() / len(x)
    taught = F.binary_cross_entropy_with_logits(z, q, reduction="sum") / len(x)
    return weights[0] * labels + weights[1] * taught


def assert_same(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    ours, right = (torch.autograd.grad(value, inputs) for value in (loss, expected))
    for a, b in zip((loss, *ours), (expected, *right), strict=True):
        assert relative_l2(a, b) < 1e-9


def test_one_teacher() -> None:
    inputs, [(x, y, t, b)] = student(), teachers((17,))
    loss_fn = DistillSigLipLoss(distill_loss_weights=list(WEIGHTS))
    found = loss_fn(*inputs, x, y, dist_logit_scale=t, dist_logit_bias=b, output_dict=True)
    (loss,) = found.values()
    assert_same(loss, written_out(inputs, sigmoid_of([(x, y, t, b)])), inputs)


@pytest.mark.parametrize("average_after_sigmoid", [True, False])
def test_features_side_by_side(average_after_sigmoid: bool) -> None:
    inputs, members = student(), teachers((17, 9))
    x, y = (torch.cat([member[side] for member in members], 1) for side in (0, 1))
    options: dict[str, Any] = {"average_after_sigmoid": average_after_sigmoid, "distill_loss_weights": WEIGHTS}
    if average_after_sigmoid:
        options |= {"dist_logit_scale": [50.0, 20.0], "dist_logit_bias": [-9.0, -4.0]}
        members = [(*member[:2], 50.0 - 30 * k, -9.0 + 5 * k) for k, member in enumerate(members)]
    else:
        options |= {"dist_logit_scale": 30.0, "dist_logit_bias": -6.0}
        members = [(x, y, 30.0, -6.0)]
    # The call's own scale and bias are then not read.
    loss = DistillSigLipLoss(teacher_dimension=[17, 9], **options)(*inputs, x, y, 1.0, 1.0)
    assert_same(loss, written_out(inputs, sigmoid_of(members)), inputs)


def test_only_labels_or_only_the_teacher() -> None:
    inputs, [(x, y, t, b)] = student(), teachers((17,))
    labels = DistillSigLipLoss(distill_loss_weights=[2.0, 0.0])(*inputs, x, y, t, b)
    torch.testing.assert_close(labels, 2 * SigLipLoss()(*inputs), rtol=1e-12, atol=0)
    taught = DistillSigLipLoss(distill_loss_weights=[0.0, 2.0])(*inputs, x, y, t, b)
    assert_same(taught, written_out(inputs, sigmoid_of([(x, y, t, b)]), (0.0, 2.0)), inputs)


def test_a_student_that_agrees_with_its_teacher_stays() -> None:
    """Which it would not with softplus(-(2q - 1) z) for the cross-entropy."""
    inputs = student()
    own = [t.detach() for t in inputs]
    loss = DistillSigLipLoss(distill_loss_weights=[0.0, 1.0])(*inputs, *own)
    assert all(g.abs().max() < 1e-13 for g in torch.autograd.grad(loss, inputs))


def of_rank(rank: int, group: Any, world: int, dist_impl: str) -> list[Tensor]:
    rows = slices((B // world,) * world)[rank]
    inputs = [t.detach()[rows] if t.dim() else t.detach() for t in student()]
    [(x, y, t, b)] = teachers((17,))
    loss_fn = DistillSigLipLoss(rank=rank, world_size=world, dist_impl=dist_impl, process_group=group)
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss = loss_fn(*leaves, x[rows], y[rows], t, b)
    loss.backward()
    return [loss.detach(), leaves[0].grad]


@pytest.mark.parametrize("dist_impl", ["bidir", "gather"])
def test_over_ranks(ranks: Ranks, dist_impl: str) -> None:
    inputs, [(x, y, t, b)] = student(), teachers((17,))
    right = written_out(inputs, sigmoid_of([(x, y, t, b)]), (1.0, 1.0))
    (dx,) = torch.autograd.grad(right, inputs[:1])
    found = ranks.run(2, of_rank, 2, dist_impl)
    # The mean over ranks is the loss of the joined batch.
    assert relative_l2(sum(loss for loss, _ in found) / 2, right) < 1e-9
    assert relative_l2(torch.cat([grad for _, grad in found]) / 2, dx) < 1e-9


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [-1.0, 1.0], [0.0, 0.0]])
def test_bad_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="distill_loss_weights"):
        DistillSigLipLoss(distill_loss_weights=weights)


def test_a_teacher_that_requires_grad_is_refused() -> None:
    inputs, [(x, y, t, b)] = student(), teachers((17,))
    with pytest.raises(ValueError, match=r"teacher\[0\].image_features requires grad"):
        DistillSigLipLoss()(*inputs, x.requires_grad_(), y, t, b)
