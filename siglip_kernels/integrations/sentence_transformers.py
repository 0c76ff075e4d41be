"""The loss for the Trainer of sentence-transformers, whole or with its gradients cached by mini-batches.

    loss = MultipleNegativesSigmoidLoss(model)  # instead of: MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, args, train_dataset, loss=loss).train()

Named as the library names its losses: "multiple negatives" takes (anchor, positive[, negatives…]), every other text of
the batch being negative too; "Sigmoid" takes the place of "Ranking", which is a softmax; "Cached" is by mini-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn

from siglip_kernels.distributed import Exchange
from siglip_kernels.loss import Backend, LossArguments, sigmoid_loss, sigmoid_loss_and_grads
from siglip_kernels.module import SigmoidLoss
from siglip_kernels.validation import one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

EqualLabels = Literal["negative", "ignored", "positive"]

CITATION = """
@inproceedings{zhai2023sigmoid,
    title={Sigmoid Loss for Language Image Pre-Training},
    author={Xiaohua Zhai and Basil Mustafa and Alexander Kolesnikov and Lucas Beyer},
    booktitle={IEEE/CVF International Conference on Computer Vision},
    year={2023},
    eprint={2303.15343},
    archivePrefix={arXiv}
}
"""
CITATION_OF_CACHING = """
@inproceedings{gao2021gradcache,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    booktitle={Workshop on Representation Learning for NLP},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv}
}
"""


class MultipleNegativesSigmoidLoss(nn.Module):
    """The sigmoid loss of every anchor against every text of the batch, its scale and bias learned beside the model.

    The columns are (anchor, positive) or (anchor, positive, negative, …), of texts, images or whatever the model
    embeds. The i-th positive is the i-th anchor's; every other positive, and every text of the further columns, is
    negative for it. The sum is divided by the number of anchors.

    ``scalars`` holds the parameters ``logit_scale``, the logarithm of t, and ``logit_bias``. The Trainer optimises them
    with the model: ``learning_rate_mapping={"logit_": 1e-3}`` gives them a rate of their own, and its weight decay
    draws the scale to 1. They are no part of the model, whose ``save_pretrained`` and whose checkpoints leave them out:
    ``torch.save(loss.scalars.state_dict(), path)`` keeps them, ``loss.scalars.load_state_dict(torch.load(path))``
    brings them back before training is resumed. Embeddings are compared without them.

    Over several processes the gradients of both scalars are averaged in backward, as DDP averages those of the model.

    Args:
        model: a SentenceTransformer.
        init_logit_scale: initial t, above 0.
        init_logit_bias: initial b; None: no bias.
        normalize: compare embeddings by cosine; False: by their products, of a model that normalises them itself.
        equal_labels: what the dataset's column "label" says, if there is one. "negative": nothing. "ignored": another
            anchor's positive of the same integer label is left out of the loss, as no negative. "positive": it is
            positive. The texts of further columns have no label.
        gather_across_devices: compare this process's anchors with the texts of every process, which travel as
            ``process_group`` says. Where torch.distributed is not initialised it changes nothing.
        process_group: with gather_across_devices, a group, a mesh or an :class:`~siglip_kernels.distributed.Exchange`;
            None: the default group, in a ring.
        backend: as for :func:`siglip_kernels.sigmoid_loss`.

    Raises:
        ValueError: an argument is not as described above; when called: fewer than two columns, columns of different
            lengths, or as ``sigmoid_loss``.
    """

    def __init__(
        self,
        model: Any,
        init_logit_scale: float = 10.0,
        init_logit_bias: float | None = -10.0,
        *,
        normalize: bool = True,
        equal_labels: EqualLabels = "negative",
        gather_across_devices: bool = False,
        process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        one_of("equal_labels", equal_labels, ("negative", "ignored", "positive"))
        if process_group is not None and not gather_across_devices:
            raise ValueError("process_group is given, but gather_across_devices is False; expected True")
        self.model = model
        self.scalars = SigmoidLoss(init_logit_scale, init_logit_bias, backend=backend, device=model.device)
        self.normalize = normalize
        self.equal_labels = equal_labels
        self.gather_across_devices = gather_across_devices
        self.process_group = process_group

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: for each column, what the model takes."""
        anchors, *texts = embed_columns(self.model, sentence_features)
        arguments = self._arguments([len(anchors), *map(len, texts)], labels)
        x, y = self._normalized(anchors), self._normalized(torch.cat(texts))
        return sigmoid_loss(x, y, *self._scale_and_bias(), **arguments)

    def _arguments(self, rows: Sequence[int], labels: Tensor | None) -> LossArguments:
        """Those of ``sigmoid_loss`` for columns of so many rows."""
        if len(rows) < 2 or len(set(rows)) > 1:
            raise ValueError(f"columns have {list(rows)} rows; expected anchors and as many positives, and no others")
        group: Any = None
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            group = Exchange() if self.process_group is None else self.process_group
        arguments: LossArguments = {"backend": self.scalars.backend, "process_group": group}
        if self.equal_labels == "negative":
            return arguments
        if labels is None or labels.shape != (rows[0],) or labels.dtype.is_floating_point:
            given = "none" if labels is None else f"{list(labels.shape)} of {labels.dtype}"
            raise ValueError(f"equal_labels={self.equal_labels!r} needs an integer label of each anchor; got {given}")
        ids = labels.to(torch.int64)
        # The texts of further columns have an id that no anchor of any rank has.
        others = ids.new_full((sum(rows[2:]),), torch.iinfo(torch.int64).min)
        is_ignored = self.equal_labels == "ignored"
        return {**arguments, "image_ids": ids, "text_ids": torch.cat([ids, others]), "ignore_ids": is_ignored}

    def _normalized(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def _scale_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """t and b, with the gradients of the parameters averaged over all processes: no DDP holds them."""
        parameters = [self.scalars.logit_scale, self.scalars.logit_bias]
        joined = torch.stack([p for p in parameters if p is not None])
        # In half precision exp would round the scale to eight or eleven bits.
        joined = joined.to(torch.promote_types(joined.dtype, torch.float32))
        if joined.requires_grad and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            joined.register_hook(_averaged)
        scale, *bias = joined.unbind()
        return scale.exp(), bias[0] if bias else None

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card shows of the loss."""
        return {
            "init_logit_scale": self.scalars.init_logit_scale,
            "init_logit_bias": self.scalars.init_logit_bias,
            "normalize": self.normalize,
            "equal_labels": self.equal_labels,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        return CITATION


class CachedMultipleNegativesSigmoidLoss(MultipleNegativesSigmoidLoss):
    """:class:`MultipleNegativesSigmoidLoss` with the memory of a mini-batch's activations, by the library's GradCache.

    Every mini-batch is embedded twice: without a graph for the loss of the whole batch, and in backward with one, to
    send the gradients of its embeddings through it, with the same dropout. Loss and gradients are those of the whole
    batch, over several processes too, and under its MatryoshkaLoss.

    Args:
        mini_batch_size: rows of a column that are embedded at once.
        mini_batch_num_tokens: instead, at most so many tokens at once.
        show_progress_bar: of the first embedding and of the second one.
        model, others: as for :class:`MultipleNegativesSigmoidLoss`.

    Raises:
        ValueError: as there; mini_batch_size or mini_batch_num_tokens is not above 0; the model begins with a
            StaticEmbedding, whose batches do not split.
    """

    uses_gradient_cache = True

    def __init__(
        self,
        model: Any,
        init_logit_scale: float = 10.0,
        init_logit_bias: float | None = -10.0,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        normalize: bool = True,
        equal_labels: EqualLabels = "negative",
        gather_across_devices: bool = False,
        process_group: ProcessGroup | DeviceMesh | Exchange | None = None,
        backend: Backend = "auto",
        show_progress_bar: bool = False,
    ) -> None:
        for name, value in (("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0; got {value}")
        if has_static_embedding_input(model):
            raise ValueError("model must not begin with a StaticEmbedding: give it to MultipleNegativesSigmoidLoss")
        super().__init__(
            model,
            init_logit_scale,
            init_logit_bias,
            normalize=normalize,
            equal_labels=equal_labels,
            gather_across_devices=gather_across_devices,
            process_group=process_group,
            backend=backend,
        )
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch; with gradients, its backward embeds the mini-batches again."""
        step = _Step(self)
        loss = step.forward_cached(sentence_features, labels)
        # The library's hook on ``loss`` sends gradients to the model; the total has those of scale and bias.
        return loss + (step.total - step.total.detach())

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings by column and mini-batch; ``with_backward`` also gives them their gradients.

        MatryoshkaLoss calls it once for each dimension, and weighs what it returns: a detached loss, but for the graph
        of scale and bias.
        """
        anchors, *texts = reps
        arguments = self._arguments([sum(map(len, column)) for column in reps], labels)
        others = [rep for column in texts for rep in column]
        scale, bias = self._scale_and_bias()
        if not with_backward:
            x, y = (self._normalized(torch.cat(list(column))) for column in (anchors, others))
            return sigmoid_loss(x, y, scale, bias, **arguments)
        (x, image_norms), (y, text_norms) = self._joined(anchors), self._joined(others)
        found = sigmoid_loss_and_grads(x, y, scale, bias, **arguments)
        _give_gradients(anchors, image_norms, found.image_features)
        _give_gradients(others, text_norms, found.text_features)
        loss = found.loss + (scale - scale.detach()) * found.logit_scale
        if bias is not None and found.logit_bias is not None:
            loss = loss + (bias - bias.detach()) * found.logit_bias
        return loss

    def _joined(self, reps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor] | None]:
        """All embeddings, normalised, in one tensor that every rep becomes a view of: none is held twice. And norms."""
        norms: list[Tensor] = []
        joined = reps[0].new_empty((sum(map(len, reps)), *reps[0].shape[1:]))
        with torch.no_grad():
            for rep, rows in zip(reps, joined.split([len(rep) for rep in reps]), strict=True):
                if self.normalize:
                    norms.append(rep.norm(dim=-1, keepdim=True).clamp_min(1e-12))  # as F.normalize
                    torch.div(rep, norms[-1], out=rows)
                else:
                    rows.copy_(rep)
                rep.data = rows
        return joined, norms if self.normalize else None

    def get_config_dict(self) -> dict[str, Any]:
        mini_batches = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return {**super().get_config_dict(), **mini_batches}

    @property
    def citation(self) -> str:
        return CITATION + CITATION_OF_CACHING


class _Step(CachedLossMixin):
    """One batch in the library's GradCache, which detaches the loss that it calculates; ``total`` is not."""

    total: Tensor

    def __init__(self, loss: CachedMultipleNegativesSigmoidLoss) -> None:
        self.loss = loss
        self.model = loss.model
        self.mini_batch_size = loss.mini_batch_size
        self.mini_batch_num_tokens = loss.mini_batch_num_tokens
        self.show_progress_bar = loss.show_progress_bar

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        self.total = self.loss.calculate_loss(reps, labels, with_backward=with_backward)
        return self.total


def _give_gradients(reps: Sequence[Tensor], norms: Sequence[Tensor] | None, gradient: Tensor) -> None:
    """Each rep gets its rows of the gradient; where ``norms`` divided it, those of what they divided."""
    for i, (rep, rows) in enumerate(zip(reps, gradient.split([len(rep) for rep in reps]), strict=True)):
        if norms is not None:
            wide = torch.promote_types(rep.dtype, torch.float32)
            unit, along = rep.detach().to(wide), rows.to(wide)
            rows.copy_((along - unit * (unit * along).sum(dim=-1, keepdim=True)) / norms[i].to(wide))
        rep.grad = rows


def _averaged(gradient: Tensor) -> Tensor:
    summed = gradient.clone()
    dist.all_reduce(summed)
    return summed / dist.get_world_size()
