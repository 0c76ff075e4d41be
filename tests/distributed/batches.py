"""Batches of several ranks, the loss of each, and what it has to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from siglip_kernels import Teacher, sigmoid_loss
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import make_inputs, relative_l2
from tests.ranks import slices

WORLDS = (2, 3, 4, 8)
NAMES = ("loss", "image_features", "text_features", "logit_scale", "logit_bias")


# Equal ids, with arguments of their own; weights of which some are 0.
KINDS: dict[str, dict[str, Any]] = {
    "ignore ids": {"ignore_ids": True},
    "masses of both": {"multi_positive": "weights"},
    "masses of images": {"multi_positive": "weights", "anchors": "images"},
    "soft targets": {"multi_positive": "soft_targets"},
    "soft targets of texts": {"multi_positive": "soft_targets", "anchors": "texts"},
    # With 3 and 0.1 a rank's dbias would be the small difference of large sums: 1.5e-5 of it is float32's own error.
    "balance": {"ignore_ids": True, "positive_weight": 2.0, "label_smoothing": 0.02},
    "soft targets, balance": {"multi_positive": "soft_targets", "positive_weight": 0.5, "label_smoothing": 0.02},
    "teacher": {"ignore_ids": True},
    "teachers, soft targets, balance": {
        "multi_positive": "soft_targets",
        "positive_weight": 2.0,
        "label_smoothing": 0.02,
    },
}
TEACHER_WEIGHTS = {"teacher": (0.6,), "teachers, soft targets, balance": (0.3, 0.5)}


@dataclass(frozen=True)
class Batch:
    """What the ranks compute: images and texts of each, and how."""

    images: tuple[int, ...]
    texts: tuple[int, ...]
    D: int = 33
    dtype: torch.dtype = torch.float32
    regime: str = "trained"
    pairs: str = "diagonal"  # or "ids", "weights", "text_weights", "none", or a key of KINDS
    reduction: str = "batchmean"
    upstream: tuple[float, ...] | None = None  # of each rank; None: 1
    requires_grad: tuple[bool, ...] = (True, True, True, True)
    exchange: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return len(self.images)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the joined batch."""
        return make_inputs(sum(self.images), sum(self.texts), self.D, self.dtype, self.regime)

    def teachers(self) -> list[Teacher]:
        """Of the joined batch; each rank has scales and biases of its own."""
        shape = sum(self.images), sum(self.texts)
        return [
            Teacher(*make_inputs(*shape, 8 * k + 13, torch.float32, "trained", seed=k + 1), weight)
            for k, weight in enumerate(TEACHER_WEIGHTS.get(self.pairs, ()))
        ]

    def labels(self) -> dict[str, Tensor]:
        """Ids and weights of the joined batch."""
        M, N = sum(self.images), sum(self.texts)
        ids = {"image_ids": (torch.arange(M) % 5).to(torch.int32), "text_ids": torch.arange(N) % 7}
        weights = {"image_weights": torch.arange(M) % 3 + 0.5, "text_weights": 3.0 * (torch.arange(N) % 2)}
        text_weights = {"text_weights": weights["text_weights"]}
        if self.pairs in KINDS:
            return {**ids, "image_weights": torch.arange(1, M + 1) % 4 * 0.5, **text_weights}
        return {"ids": ids, "weights": weights, "text_weights": text_weights}.get(self.pairs, {})


def even(world: int, b: int = 12, **options: Any) -> Batch:
    return Batch((b,) * world, (b,) * world, **options)


def uneven(world: int, **options: Any) -> Batch:
    """One rank has a single image, another fewer texts than images."""
    images = tuple([1, 20, 7, 12, 3, 5, 1, 9][:world])
    texts = tuple([4, 13, 7, 12, 5, 1, 2, 9][:world])
    return Batch(images, texts, **options)


def mesh_of(nodes: int) -> DeviceMesh:
    """Of the whole world: nodes × ranks of a node."""
    return DeviceMesh("cpu", torch.arange(dist.get_world_size()).view(nodes, -1))


def of_rank(batch: Batch, rank: int) -> tuple[list[Tensor], dict[str, Any]]:
    """A rank's own arguments: the four that are differentiated, and the labels."""
    x, y, t, b = batch.inputs()
    rows, cols = slices(batch.images)[rank], slices(batch.texts)[rank]
    own = [x[rows].clone(), y[cols].clone(), t.clone(), b.clone()]
    labels = {name: v[rows if name.startswith("image") else cols] for name, v in batch.labels().items()}
    if batch.pairs == "none":
        labels["positive_offset"] = None
    teachers = [
        t.rows(rows, cols)._replace(logit_scale=t.logit_scale / (1 + rank), logit_bias=t.logit_bias + rank)
        for t in batch.teachers()
    ]
    return own, {**labels, **KINDS.get(batch.pairs, {}), **({"teacher": teachers} if teachers else {})}


def call(rank: int, group: Any, batch: Batch) -> list[Tensor | None]:
    """Loss and gradients of a rank, through autograd."""
    own, labels = of_rank(batch, rank)
    for t, wanted in zip(own, batch.requires_grad, strict=True):
        t.requires_grad_(wanted)
    exchange = Exchange(group, **batch.exchange)
    loss = sigmoid_loss(*own, **labels, reduction=batch.reduction, process_group=exchange)
    if loss.requires_grad:
        loss.backward(torch.tensor(1.0 if batch.upstream is None else batch.upstream[rank], dtype=loss.dtype))
    return [loss.detach(), *(t.grad for t in own)]


def gold(batch: Batch, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """The same of every rank, written out over the joined batch."""
    x, y, t, b = (v.to(dtype).requires_grad_() for v in batch.inputs())
    rows, cols = slices(batch.images), slices(batch.texts)
    labels = batch.labels()
    M, N = sum(batch.images), sum(batch.texts)
    positive = torch.zeros(M, N, dtype=torch.bool)
    kind = KINDS.get(batch.pairs, {})
    if batch.pairs == "ids" or "multi_positive" in kind:
        positive = labels["image_ids"][:, None] == labels["text_ids"]
    elif batch.pairs != "none":
        for r, c in zip(rows, cols, strict=True):
            positive[r, c].fill_diagonal_(True)
    u = labels.get("image_weights", torch.ones(M)).to(dtype)
    v = labels.get("text_weights", torch.ones(N)).to(dtype)
    z = t * x @ y.T + b
    target, factor = positive.to(dtype), torch.ones(M, N, dtype=dtype)
    if "multi_positive" in kind:
        counted = positive & (u > 0)[:, None] & (v > 0)
        k_i, k_j = counted.sum(1).clamp(min=1)[:, None], counted.sum(0).clamp(min=1)
        by = {
            "both": (1 / k_i.to(dtype) + 1 / k_j.to(dtype)) / 2,
            "images": 1 / k_i.to(dtype),
            "texts": 1 / k_j.to(dtype),
        }
        m = by[kind.get("anchors", "both")].expand(M, N)
        if kind["multi_positive"] == "soft_targets":
            target = positive * m
        else:
            factor = torch.where(positive, m, 1.0)
    p, smoothing = kind.get("positive_weight", 1.0), kind.get("label_smoothing", 0.0)
    target = smoothing + (1 - 2 * smoothing) * target
    target = (1 - sum(TEACHER_WEIGHTS.get(batch.pairs, ()))) * target
    for teacher in batch.teachers():
        products = teacher.image_features.to(dtype) @ teacher.text_features.to(dtype).T
        for rank, r in enumerate(rows):
            taught = products[r] * teacher.logit_scale.to(dtype) / (1 + rank) + teacher.logit_bias.to(dtype) + rank
            target[r] += teacher.weight * taught.sigmoid()
    terms = -factor * (p * target * F.logsigmoid(z) + (1 - target) * F.logsigmoid(-z))
    if "ignore_ids" in kind:
        equal = labels["image_ids"][:, None] == labels["text_ids"]
        terms = torch.where(equal & ~positive, 0.0, terms)
    terms = terms * u[:, None] * v
    losses = []
    for r in rows:
        parts = {"sum": 1.0, "batchmean": u[r].sum(), "mean": u[r].sum() * v.sum()}
        losses.append(terms[r].sum() / parts[batch.reduction])
    upstream = batch.upstream or (1.0,) * batch.world
    dx, dy = torch.autograd.grad(sum(map(torch.mul, losses, map(torch.tensor, upstream))), (x, y), retain_graph=True)
    results = []
    for rank, (r, c) in enumerate(zip(rows, cols, strict=True)):
        scalars = torch.autograd.grad(upstream[rank] * losses[rank], (t, b), retain_graph=True)
        results.append([losses[rank].detach(), dx[r], dy[c], *scalars])
    return results


def assert_right(results: Sequence[Sequence[Any]], batch: Batch, limit: float, first: int = 0) -> None:
    """Every output of the ranks from ``first`` on within ``limit`` of the joined batch's; the unwanted are None."""
    wanted = dict(zip(NAMES, (True, *batch.requires_grad), strict=True))
    for rank, (ours, right) in enumerate(zip(results, gold(batch)[first:][: len(results)], strict=True), start=first):
        for name, a, b in zip(NAMES, ours, right, strict=True):
            if not wanted[name]:
                assert a is None, (rank, name)
                continue
            assert a.shape == b.shape, (rank, name)
            assert relative_l2(a, b) <= limit or not len(b.reshape(-1)), (rank, name, batch, relative_l2(a, b))
