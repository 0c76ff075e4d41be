"""Errors against float64 on a sample of rows, for sizes where the whole float64 gradients do not fit in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import Inputs, relative_l2

SAMPLED_ROWS = 128  # of dx and of dy
ROWS_PER_STEP = 1024  # images in one step of the float64 loss
MAX_LOSS_PAIRS = 2**34  # with more pairs the float64 loss would take longer than everything that is timed


class SampledGold(NamedTuple):
    loss: Tensor | None  # [] float64; None above MAX_LOSS_PAIRS
    rows: Tensor  # [SAMPLED_ROWS] int64: which images and texts
    dx: Tensor  # [SAMPLED_ROWS, D] float64
    dy: Tensor  # [SAMPLED_ROWS, D] float64


def sampled_gold(inputs: Inputs) -> SampledGold:
    """The loss over every pair, and the gradients of a fixed sample of images and of texts, in float64."""
    x, y, scale, bias = (t.detach().double() for t in inputs)
    B = len(x)
    all_rows = torch.arange(B, device=x.device)
    rows = all_rows[:: max(1, B // SAMPLED_ROWS)][:SAMPLED_ROWS]

    def partial_loss(images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        total = sigmoid_loss_reference(
            images, texts, scale, bias, image_ids=image_ids, text_ids=text_ids, reduction="sum"
        )
        return total / B

    loss = (
        None
        if B * B > MAX_LOSS_PAIRS
        else torch.stack([partial_loss(x[s], y, s, all_rows) for s in all_rows.split(ROWS_PER_STEP)]).sum()
    )
    sampled_x, sampled_y = x[rows].requires_grad_(), y[rows].requires_grad_()
    (dx,) = torch.autograd.grad(partial_loss(sampled_x, y, rows, all_rows), sampled_x)
    (dy,) = torch.autograd.grad(partial_loss(x, sampled_y, all_rows, rows), sampled_y)
    return SampledGold(loss, rows, dx, dy)


def sampled_errors(gold: SampledGold, loss: Tensor, inputs: Inputs) -> dict[str, float | None]:
    """Relative error of the loss, relative L2 error of the sampled gradients; None where it was not computed."""
    dx, dy = inputs.image_features.grad, inputs.text_features.grad
    return {
        "loss_error": None if gold.loss is None else relative_l2(loss.detach(), gold.loss),
        "dx_error": None if dx is None else relative_l2(dx[gold.rows], gold.dx),
        "dy_error": None if dy is None else relative_l2(dy[gold.rows], gold.dy),
    }
