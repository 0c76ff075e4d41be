"""The sigmoid loss for language-image pre-training.

For image features x [M, D], text features y [N, D], scale t and bias b:

    z_ij = t · <x_i, y_j> + b          s_ij = +1 for a positive pair, −1 for any other
    loss = Σ_ij w_ij · softplus(−s_ij z_ij) / denominator
    dz_ij = −s_ij · w_ij · σ(−s_ij z_ij) / denominator
    dx = t · dz y      dy = t · dzᵀ x      dt = Σ dz_ij <x_i, y_j>      db = Σ dz_ij

A pair that is left out has no term. With multi_positive, an image or a text with k positives shares a mass of 1 among
them: pair (i, j) has the mass m_ij = ½ (1/k_i + 1/k_j), or 1/k of one side. A positive pair has

    "weights"         term  w m softplus(−z)                            dz  −w m σ(−z)
    "soft_targets"    term  w (m softplus(−z) + (1 − m) softplus(z))    dz  w ((1 − m) σ(z) − m σ(−z))

With positive_weight p and label_smoothing ε a pair with the target τ (1, 0 or m) has τ' = ε + (1 − 2ε) τ, and

    term  w (p τ' softplus(−z) + (1 − τ') softplus(z))    dz  w ((1 − τ') σ(z) − p τ' σ(−z))

Teachers with the sigmoids q_k and the weights λ_k make the target (1 − Σ λ_k) τ' + Σ λ_k q_k.

Source: Zhai et al. 2023, arXiv 2303.15343, Algorithm 1: t = exp(t'), t' starts at log 10, b at −10, denominator = batch
size. The M×N logits exist only tile by tile, and the gradients are formed in the forward pass (see ``schedule.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, overload

from torch import Tensor

from siglip_kernels import ops
from siglip_kernels.distributed import Exchange
from siglip_kernels.distributed.exchange import validator
from siglip_kernels.stats import LogitStats, logit_stats
from siglip_kernels.teachers import Teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack  # in typing from Python 3.11

Reduction = Literal["batchmean", "mean", "sum"]
Backend = Literal["auto", "eager", "cpu", "triton", "cuda"]
MultiPositive = Literal["weights", "soft_targets"]
Anchors = Literal["both", "images", "texts"]


class SigmoidLossGrads(NamedTuple):
    """The loss and the gradient of each argument, with that argument's shape and dtype."""

    loss: Tensor  # [] float32, or float64 for float64 features
    image_features: Tensor  # [M, D]
    text_features: Tensor  # [N, D]
    logit_scale: Tensor  # like the argument; for a float, [] in the loss's dtype
    logit_bias: Tensor | None  # the same; None without a bias


class LossArguments(TypedDict, total=False):
    """The keyword arguments of :func:`sigmoid_loss` except ``return_stats``, for type checkers."""

    positive_offset: int | None
    image_ids: Tensor | None
    text_ids: Tensor | None
    image_weights: Tensor | None
    text_weights: Tensor | None
    ignore_ids: bool
    multi_positive: MultiPositive | None
    anchors: Anchors
    positive_weight: float
    label_smoothing: float
    teacher: Teacher | Sequence[Teacher] | None
    reduction: Reduction
    backend: Backend
    process_group: ProcessGroup | DeviceMesh | Exchange | None


@overload
def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **arguments: Unpack[LossArguments],
) -> Tensor: ...
@overload
def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[True],
    **arguments: Unpack[LossArguments],
) -> tuple[Tensor, LogitStats]: ...
@overload
def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool,
    **arguments: Unpack[LossArguments],
) -> Tensor | tuple[Tensor, LogitStats]: ...
def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positive_offset: int | None = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    ignore_ids: bool = False,
    multi_positive: MultiPositive | None = None,
    anchors: Anchors = "both",
    positive_weight: float = 1,  # no 1.0, which Dynamo would make an input of a dynamic graph
    label_smoothing: float = 0,
    teacher: Teacher | Sequence[Teacher] | None = None,
    return_stats: bool = False,
    reduction: Reduction = "batchmean",
    backend: Backend = "auto",
    process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
) -> Tensor | tuple[Tensor, LogitStats]:
    """Sigmoid loss of every image-text pair, without ever holding the [M, N] logits.

    Args:
        image_features: [M, D] float16, bfloat16, float32 or float64; usually L2-normalised. Under autocast, features
            are cast to the autocast dtype, as for a matmul; float64 features are not.
        text_features: [N, D], the same dtype and device.
        logit_scale: t, already exponentiated: a float, or a floating tensor of one element on the features' device.
        logit_bias: b: the same, or None for no bias.
        positive_offset: pair (i, i + positive_offset) is positive. None: every pair is negative.
        image_ids: [M] integer, given together with text_ids: a pair is positive exactly when its two ids are equal.
        text_ids: [N] integer.
        image_weights: [M] real, non-negative; the weight of a pair is image_weights[i] · text_weights[j]. 0 marks
            padding. The features of padding must be finite: 0 · NaN is NaN. Weights get no gradient. Negative weights
            raise only on the CPU, and not while compiling: elsewhere reading the answer would synchronise.
        text_weights: [N] real, non-negative.
        ignore_ids: with ids, positive_offset (any int, or None) still says which pairs are positive. Every other pair
            of equal ids is left out of the loss: duplicate captions are neither positive nor negative.
        multi_positive: with ids, an image or a text with k positives shares a mass of 1 among them, instead of 1 each.
            k does not count pairs of weight 0, such as padding. "weights": the mass multiplies the weight of the pair.
            "soft_targets": the mass is the target of the pair's sigmoid. Negative pairs do not change, and weights
            still multiply every term. Over a group, k counts the positives on every rank.
        anchors: the source of a positive pair's mass. "images": 1/k of its image; "texts": 1/k of its text; "both":
            half of each.
        positive_weight: a factor of the positive part of every term, as ``pos_weight`` of torch's
            BCEWithLogitsLoss: above 1 it favours recall. At least 0, finite; the divisor does not contain it.
        label_smoothing: ε, from 0 to 1: the target is 1 − ε for a positive pair and ε for a negative one.
        teacher: a :class:`~siglip_kernels.Teacher` of the weight λ, or a sequence of them: the target of every pair
            becomes (1 − Σ λ) times what the labels say, and Σ λ q of the teachers' sigmoids q. What is left out stays
            left out, and weights multiply on top. No gradient is formed for a teacher. Over a group the features of a
            rank's teachers travel with its texts; number, widths, dtypes and weights must be the same on every rank.
        return_stats: also return :class:`~siglip_kernels.LogitStats`, from the same pass: mean, least and largest logit
            and number, of the positive pairs and of the negative ones. With a group, they cover this rank's images
            against the texts of all ranks.
        reduction: the divisor of the sum over pairs. "batchmean": Σ image_weights (M without weights); "mean": Σ of the
            pair weights (M·N without weights); "sum": 1. Labels do not change it: a pair that is left out counts.
        backend: "auto" takes the fastest that can run the call. "eager" is plain torch and runs everywhere. A named
            backend that cannot run the call raises, with its reasons.
        process_group: None: this process alone. A group, a mesh of one dimension or two (nodes × GPUs), or an
            :class:`~siglip_kernels.distributed.Exchange`: the loss of this rank's images against the texts of all
            ranks. All ranks must call. Batches may differ in size; D, the dtype and the kind of labels may not. Each
            rank divides by its own batch, and its text gradient collects the contribution of every rank. So averaging
            parameter gradients, as DDP and FSDP do, gives the gradients of the mean of the ranks' losses. If batches
            differ in size, the mean over the joined batch is "sum" times ranks / joined batch. With positive_offset,
            only a rank's own texts can be positive. If a rank's denominator is 0 (no images, or only padding), its loss
            is NaN and it sends NaN text gradients to all ranks; "sum" avoids this.

    Returns:
        The loss, a scalar: float32, or float64 for float64 features; NaN if the denominator is 0, like a mean.
        With return_stats, (loss, LogitStats).
        Logits, sigmoid and loss are formed in that dtype, whatever the features' dtype. The same pass forms the
        gradients of the features, the scale and the bias, but only those that autograd will ask for. Not twice
        differentiable; no torch.func transforms, no forward-mode differentiation.

    Raises:
        TypeError, ValueError: an argument is not as described above, or the backend cannot run the call. With a group,
            every rank raises if one does. If a rank is gone: RuntimeError, within the group's timeout.
    """
    request = validator(process_group)(
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        positive_offset=positive_offset,
        image_ids=image_ids,
        text_ids=text_ids,
        image_weights=image_weights,
        text_weights=text_weights,
        ignore_ids=ignore_ids,
        multi_positive=multi_positive,
        anchors=anchors,
        positive_weight=positive_weight,
        label_smoothing=label_smoothing,
        teacher=teacher,
        return_stats=return_stats,
        reduction=reduction,
        backend=backend,
    )
    loss, totals = ops.differentiable(request)
    return loss if totals is None else (loss, logit_stats(totals, loss.dtype))


@overload
def sigmoid_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **arguments: Unpack[LossArguments],
) -> SigmoidLossGrads: ...
@overload
def sigmoid_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: Literal[True],
    **arguments: Unpack[LossArguments],
) -> tuple[SigmoidLossGrads, LogitStats]: ...
@overload
def sigmoid_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    return_stats: bool,
    **arguments: Unpack[LossArguments],
) -> SigmoidLossGrads | tuple[SigmoidLossGrads, LogitStats]: ...
def sigmoid_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positive_offset: int | None = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    ignore_ids: bool = False,
    multi_positive: MultiPositive | None = None,
    anchors: Anchors = "both",
    positive_weight: float = 1,  # no 1.0, which Dynamo would make an input of a dynamic graph
    label_smoothing: float = 0,
    teacher: Teacher | Sequence[Teacher] | None = None,
    return_stats: bool = False,
    reduction: Reduction = "batchmean",
    backend: Backend = "auto",
    process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
) -> SigmoidLossGrads | tuple[SigmoidLossGrads, LogitStats]:
    """The loss and all its gradients at once, outside autograd: the building block of gradient caching.

    Takes the arguments of :func:`sigmoid_loss`, whether or not they require grad. The gradients of the features have
    the features' own dtype, also under autocast.

    Returns:
        :class:`SigmoidLossGrads`; with return_stats, (SigmoidLossGrads, LogitStats).
    """
    request = validator(process_group)(
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        positive_offset=positive_offset,
        image_ids=image_ids,
        text_ids=text_ids,
        image_weights=image_weights,
        text_weights=text_weights,
        ignore_ids=ignore_ids,
        multi_positive=multi_positive,
        anchors=anchors,
        positive_weight=positive_weight,
        label_smoothing=label_smoothing,
        teacher=teacher,
        return_stats=return_stats,
        reduction=reduction,
        backend=backend,
    )
    found = ops.loss_and_grads(request, image_features.dtype, text_features.dtype)
    grads = SigmoidLossGrads(found.loss, found.dx, found.dy, found.dscale, found.dbias)
    return grads if found.stats is None else (grads, logit_stats(found.stats, found.loss.dtype))


def sigmoid_losses(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    positive_offset: int | None = 0,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    image_weights: Tensor | None = None,
    text_weights: Tensor | None = None,
    ignore_ids: bool = False,
    multi_positive: MultiPositive | None = None,
    anchors: Anchors = "both",
    positive_weight: float = 1,
    label_smoothing: float = 0,
    teacher: Teacher | Sequence[Teacher] | None = None,
    backend: Backend = "auto",
    process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
) -> Tensor:
    """The loss of each image against all texts, forward only and in one matrix product: for the choice of data.

    Takes the arguments of :func:`sigmoid_loss` but ``reduction`` and ``return_stats``. The losses of texts are those of
    the exchanged call: texts as images, ids, weights and teachers' features exchanged too, and a ``positive_offset`` of
    the other sign. To train on a selection, pass it as ``image_weights`` of 0 and 1.

    Returns:
        [M] float32, or float64 for float64 features, detached: Σ_j of the terms of image i, weights included. They add
        up to ``sigmoid_loss(..., reduction="sum")``. Over a group, those of this rank's images against all texts.
    """
    request = validator(process_group)(
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        positive_offset=positive_offset,
        image_ids=image_ids,
        text_ids=text_ids,
        image_weights=image_weights,
        text_weights=text_weights,
        ignore_ids=ignore_ids,
        multi_positive=multi_positive,
        anchors=anchors,
        positive_weight=positive_weight,
        label_smoothing=label_smoothing,
        teacher=teacher,
        return_stats=False,
        reduction="sum",
        backend=backend,
    )
    return ops.image_losses(request)
