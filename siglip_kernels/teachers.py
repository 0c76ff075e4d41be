"""Teachers, whose sigmoid is the soft target of every pair, and the logits of several in one block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Teacher(NamedTuple):
    """A frozen dual encoder on the same batch: q_ij = σ(t' <x'_i, y'_j> + b') becomes part of the target of a pair.

    With the weight λ, or the weights of several teachers, the target is (1 − Σ λ) · label + Σ λ · q. A teacher gets no
    gradient. Its logits are formed block by block, like the student's, and never held.
    """

    image_features: Tensor  # [M, D'] floating, any D', on the student's device; usually L2-normalised
    text_features: Tensor  # [N, D'], the same dtype
    logit_scale: Any  # t', already exponentiated: a float, or a floating tensor of one element
    logit_bias: Any = None  # b': the same, or None for no bias
    weight: float = 1.0  # λ, from 0 to 1; those of several teachers add up to at most 1

    def rows(self, images: slice, texts: slice) -> Teacher:
        """The same teacher of these images and texts."""
        return self._replace(image_features=self.image_features[images], text_features=self.text_features[texts])

    def contiguous(self) -> Teacher:
        """The same teacher, its features contiguous."""
        images, texts = self.image_features.contiguous(), self.text_features.contiguous()
        return self._replace(image_features=images, text_features=texts)


class TeacherLogits(NamedTuple):
    """What a block kernel sees of all teachers: z' = scale · products + bias, and the weight of their targets."""

    products: Tensor  # [r, c] the logits' dtype, rows contiguous
    scale: Tensor  # [] the same dtype
    bias: Tensor  # []
    weight: float  # Σ λ, from 0 to 1


def as_teachers(teacher: Any) -> tuple[Teacher, ...]:
    """The public argument, None, one or a sequence, without those that have no weight."""
    every = () if teacher is None else (teacher,) if isinstance(teacher, Teacher) else tuple(teacher)
    return tuple(t for t in every if t.weight != 0)


def from_tensors(tensors: Sequence[Any], weights: Iterable[float]) -> tuple[Teacher, ...]:
    """Teachers from the first four fields of each, one after the other, and their weights."""
    fields = zip(tensors[::4], tensors[1::4], tensors[2::4], tensors[3::4], weights, strict=True)
    return tuple(map(Teacher._make, fields))


def total_weight(teachers: Sequence[Teacher]) -> float:
    """Σ λ: what the labels do not decide."""
    return min(1.0, math.fsum(teacher.weight for teacher in teachers))


def teacher_logits(
    teachers: Sequence[Teacher],
    products: Tensor,  # [r, c] buffer of the logits' dtype
    inner_products: Callable[..., None],  # writes x @ y.T into its first argument
) -> TeacherLogits:
    """The logits of one block's teachers, whose scales and biases are tensors.

    Several teachers are one whose sigmoid is the mean of theirs: z' = log Σ λ σ(z'_k) − log Σ λ σ(−z'_k).
    """
    weight, dtype = total_weight(teachers), products.dtype
    positive = negative = torch.full((), -math.inf, dtype=dtype, device=products.device)
    for teacher in teachers:
        inner_products(products, teacher.image_features, teacher.text_features)
        scale, bias = (t.reshape(()).to(dtype) for t in (teacher.logit_scale, teacher.logit_bias))
        if len(teachers) == 1:
            return TeacherLogits(products, scale, bias, weight)
        z = products.mul_(scale).add_(bias)
        log_weight = math.log(teacher.weight)
        positive = torch.logaddexp(positive, F.logsigmoid(z) + log_weight)
        negative = torch.logaddexp(negative, F.logsigmoid(-z) + log_weight)
    torch.sub(positive, negative, out=products)
    one, zero = (torch.full((), value, dtype=dtype, device=products.device) for value in (1.0, 0.0))
    return TeacherLogits(products, one, zero, weight)
