"""Errors against float64 at sizes whose gold gradients are too large to form whole: exact, on a sample of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import Inputs, relative_l2

SAMPLE = 128  # rows of dx, and of dy
ROWS = 1024  # images a step of the float64 loss
LOSS_PAIRS = 2**34  # beyond, the float64 loss would take longer than everything that is timed


class Gold(NamedTuple):
    loss: Tensor | None  # [] float64; None beyond LOSS_PAIRS
    rows: Tensor  # [SAMPLE] int64: which images and texts
    dx: Tensor  # [SAMPLE, D] float64
    dy: Tensor  # [SAMPLE, D] float64


def gold(inputs: Inputs) -> Gold:
    """The loss over every pair, and the gradients of a fixed sample of images and of texts, in float64."""
    x, y, scale, bias = (t.detach().double() for t in inputs)
    B = len(x)
    every = torch.arange(B, device=x.device)
    rows = every[:: max(1, B // SAMPLE)][:SAMPLE]

    def part(images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
        total = sigmoid_loss_reference(
            images, texts, scale, bias, image_ids=image_ids, text_ids=text_ids, reduction="sum"
        )
        return total / B

    loss = None if B * B > LOSS_PAIRS else torch.stack([part(x[s], y, s, every) for s in every.split(ROWS)]).sum()
    some_x, some_y = x[rows].requires_grad_(), y[rows].requires_grad_()
    (dx,) = torch.autograd.grad(part(some_x, y, rows, every), some_x)
    (dy,) = torch.autograd.grad(part(x, some_y, every, rows), some_y)
    return Gold(loss, rows, dx, dy)


def errors(gold: Gold, loss: Tensor, inputs: Inputs) -> dict[str, float | None]:
    """Relative error of the loss, relative L2 error of the sampled gradients; None for one not formed."""
    dx, dy = inputs.image_features.grad, inputs.text_features.grad
    return {
        "loss_error": None if gold.loss is None else relative_l2(loss.detach(), gold.loss),
        "dx_error": None if dx is None else relative_l2(dx[gold.rows], gold.dx),
        "dy_error": None if dy is None else relative_l2(dy[gold.rows], gold.dy),
    }
