"""The block kernel in plain torch: any device, any dtype, float32 logits for half-precision features."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from siglip_kernels.backends.base import BlockKernel, BlockTask, Problem
from siglip_kernels.gemm import accumulates_in_float32, gemm_
from siglip_kernels.pairs import PairSpec
from siglip_kernels.stats import measure_logits
from siglip_kernels.teachers import TeacherLogits


class Workspace(NamedTuple):
    """[R, C] buffers in the logits' dtype."""

    u: Tensor  # inner products, then dz·u
    a: Tensor  # -s·z, then σ and dz
    terms: Tensor  # softplus(a)


class EagerBlockKernel(BlockKernel):
    """A dozen elementwise passes over blocks that stay in the cache (CPU) or fill the device (GPU)."""

    name = "eager"

    def why_not(self, problem: Problem) -> list[str]:
        return []

    def operand_dtype(self, problem: Problem) -> torch.dtype:
        half = problem.dtype in (torch.float16, torch.bfloat16)
        # Without GEMMs that accumulate in float32, half-precision operands would round the logits: widen them.
        keep = not half or (problem.rounds_out and accumulates_in_float32(problem.dtype, problem.device))
        return problem.dtype if keep else torch.float32

    def block_shape(self, problem: Problem) -> tuple[int, int]:
        # CPU: 16 MiB in total, which suits the caches; speed is flat from (512, 512) on (see docs/measured-facts.md).
        # GPU: 256 MiB in total, large enough for full waves.
        return (1024, 1024) if problem.device.type == "cpu" else (4096, 4096)

    def workspace(self, problem: Problem, R: int, C: int) -> Workspace:
        dtype = torch.float64 if problem.dtype is torch.float64 else torch.float32
        return Workspace(*(torch.empty(R, C, dtype=dtype, device=problem.device) for _ in Workspace._fields))

    def block(self, task: BlockTask) -> None:
        pairs, dz, dz_scale, sums = task.pairs, task.dz, task.dz_scale, task.sums
        shape = r, c = task.x.shape[0], task.y.shape[0]
        u, a, terms = (b if b.shape == shape else b.view(-1)[: r * c].view(r, c) for b in task.workspace)
        positive = _Positives(pairs, r, c)

        gemm_(u, task.x, task.y.T)
        torch.mul(u, task.scale, out=a).add_(task.bias)
        if task.stats is not None:
            measure_logits(a, pairs, task.stats)
        positive.negate_(a)
        positive.exclude_(a)
        has_parts = pairs.multi_positive or pairs.has_balance or task.teacher is not None
        parts = _Parts(pairs, a, positive, task.teacher) if has_parts else None
        torch.ops.aten.softplus.out(a, 1, 40, out=terms)
        if parts is not None:
            parts.weigh_terms_(terms)
        sums[0] = _weight_(terms, pairs).sum()
        if task.image_losses is not None:
            torch.sum(terms, dim=1, dtype=sums.dtype, out=task.image_losses)
        if task.loss_only:
            return

        # Write directly into dz if its dtype, scale and layout allow it.
        g = dz if dz is not None and dz_scale is None and dz.dtype is a.dtype and dz.is_contiguous() else a
        torch.sigmoid(a, out=g)
        if parts is not None:
            parts.weigh_gradient_(g)
        positive.negate_(g)
        _weight_(g, pairs)
        # Not torch.dot: over a block its accumulation errs by 5e-6 of Σ|terms|, the cascade of sum by 4e-8.
        sums[1] = u.mul_(g).sum()
        sums[2] = g.sum()
        if dz is not None and g is not dz:
            torch.mul(g, 1.0 if dz_scale is None else dz_scale, out=dz)


class _Positives:
    """Changes the sign of the block's positive pairs. If they form a diagonal, it touches no other pair."""

    def __init__(self, pairs: PairSpec, r: int, c: int) -> None:
        self.offset = pairs.positive_offset if pairs.may_have_positives(r, c) else None
        self.mask = pairs.positive_mask(r, c) if pairs.has_ids and not pairs.ignore_ids else None
        self.ignored = pairs.ignored_mask(r, c) if pairs.ignore_ids else None

    def negate_(self, a: Tensor) -> None:
        if self.mask is not None:
            torch.where(self.mask, -a, a, out=a)
        elif self.offset is not None:
            a.diagonal(self.offset).neg_()

    def exclude_(self, a: Tensor) -> None:
        """Set pairs that are left out to -inf: softplus and sigmoid of -inf are 0."""
        if self.ignored is not None:
            a.masked_fill_(self.ignored, -math.inf)


class _Parts:
    """With masses, a balance or a teacher the term is f·softplus(a) + g·softplus(-a), dz is f·σ(a) - g·σ(-a)."""

    def __init__(self, pairs: PairSpec, a: Tensor, positives: _Positives, teacher: TeacherLogits | None) -> None:
        mask = positives.mask
        positive = pairs.positive_mask(a.shape[0], a.shape[1], a.device) if mask is None else mask
        mass = torch.ones_like(a)
        if pairs.image_masses is not None and pairs.text_masses is not None:
            mass = pairs.image_masses[:, None] + pairs.text_masses
        smoothing, is_soft = pairs.label_smoothing, pairs.multi_positive == "soft_targets"
        # The target and the rest to 1 of positives, without a difference that cancels, however small the smoothing is.
        kept: float | Tensor
        kept, label, factor = 1 - smoothing, mass if is_soft else 1.0, 1.0 if is_soft else mass
        target, rest = kept * label + smoothing * (1 - label), kept * (1 - label) + smoothing * label
        no_target: float | Tensor = smoothing  # the target of negatives, whose rest to 1 is `kept`
        if teacher is not None:
            z = teacher.products * teacher.scale + teacher.bias
            taught, untaught, own = teacher.weight * z.sigmoid(), teacher.weight * (-z).sigmoid(), 1 - teacher.weight
            target, rest = own * target + taught, own * rest + untaught
            no_target, kept = own * smoothing + taught, own * kept + untaught
        self.f = torch.where(positive, pairs.positive_weight * target * factor, kept)
        self.g = self.opposite = None
        if pairs.has_two_parts:
            self.g = torch.where(positive, rest * factor, pairs.positive_weight * no_target)
            if positives.ignored is not None:
                self.g.masked_fill_(positives.ignored, 0.0)
            # Of 0 times infinity nothing is left: softplus and sigmoid of -inf are 0.
            self.opposite = torch.where(self.g == 0, -math.inf, -a)

    def weigh_terms_(self, terms: Tensor) -> None:
        terms.mul_(self.f)
        if self.g is not None:
            terms.addcmul_(torch.ops.aten.softplus(self.opposite, 1, 40), self.g)

    def weigh_gradient_(self, dz: Tensor) -> None:
        dz.mul_(self.f)
        if self.g is not None and self.opposite is not None:
            dz.addcmul_(self.opposite.sigmoid(), self.g, value=-1)


def _weight_(a: Tensor, pairs: PairSpec) -> Tensor:
    if pairs.image_weights is not None and pairs.text_weights is not None:
        a.mul_(pairs.image_weights[:, None]).mul_(pairs.text_weights[None, :])
    return a
