"""A GPU kernel's block against the same block by the eager kernel, on the same device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockTask, LossTask, Problem
from siglip_kernels.backends.eager import EagerBlockKernel
from siglip_kernels.gemm import allows_tf32
from siglip_kernels.host_read import read
from siglip_kernels.pairs import PairSpec
from siglip_kernels.stats import SIZE, reduce_stats
from siglip_kernels.testing import limits

PAIRS_AT_ONCE = 2**22  # that the eager kernel works on: 16 MiB for each of its buffers
RESULT_ROUNDING = 4 * 2.0**-24  # of the loss and its scalars, which are sums over a denominator
# An element of dz is not compared below this part of the largest possible one: float16, or the device, may make it 0.
NEGLIGIBLE = 2.0**-36


def run_eager(task: BlockTask, inspect: Callable[[slice, PairSpec, Tensor], None] | None = None) -> None:
    """The block by the eager kernel, some rows at a time.

    ``inspect`` gets each part's rows, pairs and dz [rows, c] in float32; the task's dz then is not written.
    """
    kernel, (r, c) = EagerBlockKernel(), (len(task.x), len(task.y))
    height = max(1, min(r, PAIRS_AT_ONCE // c))
    workspace = kernel.workspace(Problem(r, c, task.x.shape[1], task.x.dtype, task.x.device), height, c)
    buffer = None if inspect is None else task.x.new_empty((height, c), dtype=torch.float32)
    sums, stats = [], []
    for begin in range(0, r, height):
        rows = slice(begin, min(begin + height, r))
        dz = buffer[: rows.stop - begin] if buffer is not None else None if task.dz is None else task.dz[rows]
        pairs = task.pairs.block(rows, slice(0, c))
        teacher = task.teacher
        sums.append(torch.zeros_like(task.sums))
        if task.stats is not None:
            stats.append(task.stats.new_empty(1, SIZE))
        kernel.block(
            task._replace(
                x=task.x[rows],
                pairs=pairs,
                sums=sums[-1],
                dz=dz,
                workspace=workspace,
                stats=stats[-1][0] if stats else None,
                image_losses=None if task.image_losses is None else task.image_losses[rows],
                teacher=None if teacher is None else teacher._replace(products=teacher.products[rows]),
            )
        )
        if inspect is not None and dz is not None:
            inspect(rows, pairs, dz)
    torch.sum(torch.stack(sums), dim=0, out=task.sums)
    if task.result is not None:
        task.result.write(task.sums, task.dx_scale())
    if task.stats is not None:
        task.stats.copy_(reduce_stats(stats, task.stats.device, task.stats.dtype))


def errors_of_launch(launch: Callable[[BlockTask], None], task: BlockTask) -> dict[str, float]:
    """Launch on outputs full of NaN. The error of each output, as a multiple of what is allowed.

    Empty if that cannot be told: the inputs overflow, all features or weights are 0, or memory is short.
    """
    for output in (
        task.sums,
        task.dz,
        task.stats,
        task.image_losses,
        *(task.result[:2] if task.result is not None else ()),
    ):
        if output is not None:
            output.fill_(torch.nan)
    launch(task)
    try:
        with torch.no_grad():
            return _errors(task)
    except torch.OutOfMemoryError:
        return {}


def _errors(task: BlockTask) -> dict[str, float]:
    x, y, pairs, dz = task.x, task.y, task.pairs, task.dz
    dz_scale = 1.0 if task.dz_scale is None else task.dz_scale
    limit, count = limits(x.dtype, "hot"), len(x) * len(y)
    is_half = dz is not None and dz.dtype in (torch.float16, torch.bfloat16)
    rounding = torch.finfo(dz.dtype).eps if dz is not None and is_half else 2.0**-18  # of dz; twice that of half
    # Σ|products| of a logit at most, and the error of a sum of D of them in float32, in any order and in both kernels.
    u = _largest_norm(x) * _largest_norm(y)
    z = task.scale.abs() * u + task.bias.abs()
    is_tf32 = x.dtype is torch.float32 and allows_tf32()
    z_error = z * (2.0**-8 if is_tf32 else (32 + x.shape[1] / 8) * 2.0**-23)
    weight = torch.ones_like(z)
    if pairs.image_weights is not None and pairs.text_weights is not None:
        weight = pairs.image_weights.amax() * pairs.text_weights.amax()
    negligible = NEGLIGIBLE * weight * dz_scale + (2.0**-24 if dz is not None and dz.dtype is torch.float16 else 1e-30)

    worst, total = torch.zeros_like(z), torch.zeros((), dtype=task.sums.dtype, device=x.device)  # error; Σ|terms of dz|

    def inspect(rows: slice, part: PairSpec, expected: Tensor) -> None:
        nonlocal worst, total
        size = expected.abs()
        if pairs.has_two_parts:  # a difference of terms: up to the weight for positives, and for others their target
            target: float | Tensor = pairs.label_smoothing
            if (teacher := task.teacher) is not None:
                taught = torch.sigmoid(teacher.products[rows] * teacher.scale + teacher.bias)
                target = (1 - teacher.weight) * target + teacher.weight * taught
            positive = part.positive_mask(size.shape[0], size.shape[1], size.device)
            size += torch.where(positive, 1.0, pairs.positive_weight * target) * weight * dz_scale
        total = total + (size.sum(dtype=total.dtype) / dz_scale)
        if dz is not None:
            allowed = torch.addcmul(negligible, size, rounding + z_error)
            worst = torch.maximum(worst, torch.sub(dz[rows], expected).abs_().div_(allowed).amax())

    stats = None if task.stats is None else torch.empty_like(task.stats)
    of_images = None if task.image_losses is None else torch.empty_like(task.image_losses)
    reference = task._replace(
        sums=torch.empty_like(task.sums), stats=stats, loss_only=False, result=None, image_losses=of_images
    )
    run_eager(reference, inspect)
    of_terms = total * z_error + NEGLIGIBLE * weight * count
    loss, dzu, dz_sum, *_ = (task.sums - reference.sums).abs()
    errors = {
        "loss": loss / (limit.loss * reference.sums[0] + of_terms),
        "Σ dz·u": dzu / ((limit.scalars * total + of_terms) * u),
        "Σ dz": dz_sum / (limit.scalars * total + of_terms),
        "dz": worst,
    }
    if task.loss_only:
        errors = {"loss": errors["loss"]}
    if task.image_losses is not None and of_images is not None:
        allowed = limit.loss * of_images + of_terms
        errors["losses of images"] = ((task.image_losses - of_images).abs() / allowed).amax()
    if task.result is not None:
        errors["result"] = _result_error(task, task.result)
    if task.stats is not None and stats is not None:
        of_logits = z_error + 2.0**-18 * z
        allowed = torch.stack([count * of_logits] * 2 + [torch.full_like(z, 0.5)] * 2 + [of_logits] * 4)
        difference = torch.where(task.stats == stats, 0.0, (task.stats - stats).abs())
        errors["stats"] = (difference / allowed).amax()
    *measured, least, largest = read(torch.stack([t.double() for t in (*errors.values(), u * total, z + total)]))
    return dict(zip(errors, measured, strict=True)) if least > 0 and largest < math.inf else {}


def _result_error(task: BlockTask, result: LossTask) -> Tensor:
    """Of the loss and its scalars, by the sums that the kernel wrote."""
    expected = LossTask(torch.empty_like(result.loss), torch.empty_like(result.scalars), result.images, result.texts)
    expected.write(task.sums.clone(), task.dx_scale())
    which = [0, 3] if task.loss_only else [0, 1, 2, 3]
    difference = torch.sub(result.scalars, expected.scalars)[which].abs()
    difference = torch.cat([difference, (result.loss - expected.loss).abs().reshape(1)])
    allowed = expected.scalars[[*which, 0]].abs() * RESULT_ROUNDING + torch.finfo(torch.float32).tiny
    return (difference / allowed).amax()


def _largest_norm(features: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).amax()
