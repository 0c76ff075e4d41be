"""A fused model under DDP, FSDP2 and a process group, and in the library's Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from siglip_kernels.distributed import Exchange
from siglip_kernels.integrations.transformers import fuse_loss, unfuse_loss
from siglip_kernels.testing import relative_l2
from tests.integrations.hosts import (
    KINDS,
    TINY,
    Batch,
    Tensors,
    build,
    cast,
    gradients,
    is_key_bias,
    make_batch,
    parts,
    rows,
)
from tests.ranks import Ranks, slices

WORLD, PAIRS = 2, 8
# Siglip2 resizes its position embeddings in float32 whatever its dtype.
LIMITS = {"siglip": 1e-11, "siglip2": 1e-6}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(WORLD)
    yield world
    world.close()


def joined(kind: str) -> tuple[nn.Module, Batch]:
    """In float64, where rounding excuses no difference, with a bias at which negatives count."""
    model = build(kind, TINY, 2).double()
    nn.init.constant_(model.logit_bias, -2.0)
    return model, cast(make_batch(kind, TINY, PAIRS), torch.float64)


def shard(model: Any) -> None:
    for tower in (model.text_model, model.vision_model):
        for layer in tower.encoder.layers:
            fully_shard(layer)
    fully_shard(model)


def of_this_rank(rank: int, group: Any, kind: str, how: str, algorithm: str | None) -> Tensors:
    """Loss and gradients of this rank's half of the batch; without an algorithm, of its own texts alone."""
    model, batch = joined(kind)
    batch = rows(batch, slices([PAIRS // WORLD] * WORLD)[rank])
    process_group = algorithm and Exchange(group, algorithm)
    if how == "fsdp, then fused":
        shard(model)
    fuse_loss(model, process_group)
    called: Any = model
    if how == "ddp":
        called = DistributedDataParallel(model)
    elif how == "compiled":
        called = torch.compile(model, fullgraph=True, backend="aot_eager")
    elif how == "fsdp":
        shard(model)
    loss = called(**batch).loss
    loss.backward()
    found = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in named(model)}
    if how == "compiled":  # no wrapper averages
        for t in found.values():
            torch.distributed.all_reduce(t, group=group)
            t /= WORLD
    return {"loss": loss.detach(), **parts(found)}


def named(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.named_parameters())


@pytest.fixture(scope="module", params=KINDS)
def of_theirs(request: pytest.FixtureRequest) -> tuple[str, Tensors]:
    """The model's own loss of the joined batch, in one process."""
    return request.param, gradients(*joined(request.param))


def worst(ours: list[Tensors], theirs: Tensors) -> float:
    """Of the mean loss and of every gradient on every rank."""
    loss = torch.stack([found["loss"] for found in ours]).mean()
    names = [name for name in theirs if name != "loss" and not is_key_bias(name)]
    return max(relative_l2(loss, theirs["loss"]), *(relative_l2(t[n], theirs[n]) for t in ours for n in names))


@pytest.mark.parametrize(
    ("how", "algorithm"),
    [("ddp", "ring"), ("ddp", "gather"), ("fsdp", "ring"), ("fsdp, then fused", "gather"), ("compiled", "ring")],
)
def test_two_processes_are_one_with_the_joined_batch(
    ranks: Ranks, of_theirs: tuple[str, Tensors], how: str, algorithm: str
) -> None:
    kind, theirs = of_theirs
    assert worst(ranks.run(WORLD, of_this_rank, kind, how, algorithm), theirs) <= LIMITS[kind]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_texts_that_stay_at_home_make_another_loss(ranks: Ranks, of_theirs: tuple[str, Tensors], how: str) -> None:
    """The test above can fail."""
    kind, theirs = of_theirs
    assert worst(ranks.run(WORLD, of_this_rank, kind, how, None), theirs) > 1e-2


def what_is_refused(rank: int, group: Any) -> list[str]:
    model, batch = joined("siglip")
    fuse_loss(model, group)
    said = []
    given = {**batch, "input_ids": batch["input_ids"][: PAIRS - rank]}  # rank 1 has a text less
    try:
        model(**given)
    except ValueError as error:
        said.append(str(error))
    try:
        copy.deepcopy(model)(**batch)
        said.append("a copy shares the group")
        shard(model)
        unfuse_loss(model)
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_is_refused_on_one_rank_is_refused_on_all(ranks: Ranks) -> None:
    first, second = ranks.run(WORLD, what_is_refused)
    assert "rank 1 refused the arguments" in first[0]
    assert "pixel_values hold 8 images, input_ids 7 texts" in second[0]
    for said in (first, second):
        assert said[1] == "a copy shares the group"
        assert "FSDPSiglipModel after fuse_loss" in said[2]


class Pairs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """With a column that no model takes: the Trainer drops it, by the signature of ``forward``."""

    def __init__(self, batch: Batch) -> None:
        self.columns = {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**{name: value[i] for name, value in self.columns.items()}, "caption": "dropped"}


def collate(items: list[dict[str, Any]]) -> Batch:
    return {**{name: torch.stack([item[name] for item in items]) for name in items[0]}, "return_loss": True}


class Trained(dict[str, Any]):
    """Weights, losses and metrics of a run."""


def train(model: nn.Module, kind: str, folder: Path, **options: Any) -> Trained:
    data = Pairs(make_batch(kind, TINY, 40))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_steps=5,
        **options,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    predictions = trainer.predict(data).predictions
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Trained(weights=weights, losses=losses, eval=trainer.evaluate()["eval_loss"], predictions=predictions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_trainer(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Steps, logs, checkpoint, evaluation and prediction; the caption's column is dropped, not refused."""
    limit = 1e-2 if "bf16" in options else 1e-5
    begin = build(kind, TINY, 2)
    theirs = train(copy.deepcopy(begin), kind, tmp_path / "theirs", **options)
    fused = fuse_loss(copy.deepcopy(begin))
    ours = train(fused, kind, tmp_path / "ours", **options)
    assert len(ours["losses"]) == 5
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=limit)
    assert ours["eval"] == pytest.approx(theirs["eval"], rel=limit)
    for name, weight in ours["weights"].items():
        if name.endswith("weight"):  # AdamW makes long steps of a key bias's rounding error
            assert relative_l2(weight, theirs["weights"][name]) <= limit, name
    # Predictions are the outputs but the loss: without logits, the embeddings come first.
    assert [t.shape for t in ours["predictions"][:2]] == [t.shape for t in theirs["predictions"][2:4]]
    loaded = type(begin).from_pretrained(tmp_path / "ours" / "checkpoint-5")
    assert all(torch.equal(p, ours["weights"][name]) for name, p in loaded.named_parameters())
