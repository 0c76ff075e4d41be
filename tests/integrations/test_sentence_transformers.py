"""The losses for sentence-transformers, in the library's own Trainer, against plain torch there."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss

from bench.harness.timing import MIB, peak_bytes
from siglip_kernels.distributed import Exchange
from siglip_kernels.integrations import sentence_transformers as ours
from siglip_kernels.integrations.sentence_transformers import (
    CachedMultipleNegativesSigmoidLoss,
    MultipleNegativesSigmoidLoss,
)
from tests.integrations.sentences import BIAS, Materialised, Tensors, as_rank, load, pairs, save, train, weights, worst
from tests.ranks import Ranks

LIMIT = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "two negatives": {"negatives": 2},
    "image and text": {"images": True},
    "labels ignored": {"negatives": 1, "labels": True, "equal_labels": "ignored"},
    "labels positive": {"negatives": 1, "labels": True, "equal_labels": "positive"},
}


def make(model: Any, how: str, **options: Any) -> nn.Module:
    if how == "materialised":
        return Materialised(model, **options)
    if how == "whole":
        return MultipleNegativesSigmoidLoss(model, 10.0, BIAS, **options)
    return CachedMultipleNegativesSigmoidLoss(model, 10.0, BIAS, mini_batch_size=3, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind), kind) for kind in ("texts", "images")}


def trained(folders: dict[str, Path], how: str, case: str, **options: Any) -> tuple[Tensors, list[float]]:
    columns = dict(CASES[case])
    labels = {"equal_labels": columns.pop("equal_labels")} if "equal_labels" in columns else {}
    folder = folders["images" if columns.get("images") else "texts"]
    return train(functools.partial(make, how=how, **labels), folder, pairs(**columns), **options)


@pytest.mark.parametrize("case", CASES)
def test_trained_weights_are_those_of_plain_torch(folders: dict[str, Path], case: str) -> None:
    """20 steps in float32, mini-batches of 3 in a batch of 8, and the logged and evaluated losses."""
    theirs, losses = trained(folders, "materialised", case)
    assert theirs["logit_bias"] != BIAS
    for how in ("whole", "cached"):
        found, logged = trained(folders, how, case)
        print(f"{case}, {how}: {worst(found, theirs):.1e}")
        assert worst(found, theirs) <= LIMIT
        assert logged == pytest.approx(losses, rel=LIMIT)


def test_cached_under_accumulation_of_gradients(folders: dict[str, Path]) -> None:
    """The Trainer divides each loss: scale and bias must see that too. And clips, and decays."""
    options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1}
    whole, _ = trained(folders, "whole", "two negatives", **options)
    cached, _ = trained(folders, "cached", "two negatives", **options)
    print(f"{worst(cached, whole):.1e}")
    assert worst(cached, whole) <= LIMIT


def without_bias(self: MultipleNegativesSigmoidLoss) -> tuple[Tensor, None]:
    return self.scalars.logit_scale.exp(), None


def without_exp(self: MultipleNegativesSigmoidLoss) -> tuple[Tensor, Tensor | None]:
    return self.scalars.logit_scale, self.scalars.logit_bias


def detached(self: MultipleNegativesSigmoidLoss) -> tuple[Tensor, Tensor | None]:
    return self.scalars.logit_scale.detach().exp(), self.scalars.logit_bias


@pytest.mark.parametrize("how", ["whole", "cached"])
@pytest.mark.parametrize("mutant", [without_bias, without_exp, detached])
def test_a_faulty_scale_or_bias_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, how: str, mutant: Any
) -> None:
    theirs, _ = trained(folders, "materialised", "pairs")
    monkeypatch.setattr(MultipleNegativesSigmoidLoss, "_scale_and_bias", mutant)
    found, _ = trained(folders, how, "pairs")
    assert worst(found, theirs) > 100 * LIMIT


def test_texts_that_are_not_normalised_and_labels_that_are_not_read_are_noticed(folders: dict[str, Path]) -> None:
    theirs, _ = trained(folders, "materialised", "labels ignored")
    for options in ({"normalize": False, "equal_labels": "ignored"}, {"equal_labels": "negative"}):
        make_loss = functools.partial(make, how="whole", **options)
        found, _ = train(make_loss, folders["texts"], pairs(negatives=1, labels=True))
        assert worst(found, theirs) > 100 * LIMIT


def test_dropout_is_repeated(tmp_path: Path) -> None:
    """The second embedding draws as the first: the gradients are those of the loss, not of another draw."""
    model = load(save(tmp_path, dropout=0.3)).train()
    columns = [model.preprocess(pairs(6)[name]) for name in ("anchor", "positive")]
    loss = make(model, "cached")
    torch.manual_seed(3)
    loss(columns, None).backward()
    found = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    loss.zero_grad()
    # The same mini-batches with their graphs, in the same order.
    torch.manual_seed(3)
    reps = [[model(rows(column, begin))["sentence_embedding"] for begin in (0, 3)] for column in columns]
    loss.calculate_loss(reps).backward()
    right = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    assert worst(drop_keys(found), drop_keys(right)) <= LIMIT


def rows(column: dict[str, Any], begin: int) -> dict[str, Any]:
    cut = {name: value[begin : begin + 3] if isinstance(value, Tensor) else value for name, value in column.items()}
    width = int(cut["attention_mask"].sum(1).max())  # the library drops padding that a mini-batch does not need
    return {name: value[:, :width] if isinstance(value, Tensor) else value for name, value in cut.items()}


def drop_keys(gradients: Tensors) -> Tensors:
    return {name: t for name, t in gradients.items() if not name.endswith("key.bias") and t.any()}


@pytest.mark.parametrize("how", ["whole", "cached"])
def test_matryoshka(folders: dict[str, Path], how: str) -> None:
    """The library's wrapper, with weights that scale and bias must see too."""
    dimensions: dict[str, Any] = {"matryoshka_dims": [32, 8], "matryoshka_weights": [1, 0.25]}

    def wrapped(model: Any, how: str) -> nn.Module:
        return MatryoshkaLoss(model, make(model, how), **dimensions)

    def run(how: str) -> Tensors:
        found, _ = train(functools.partial(wrapped, how=how), folders["texts"], pairs())
        return {name.replace("loss.scalars.", "loss."): t for name, t in found.items() if "loss.model" not in name}

    assert worst(run(how), run("materialised")) <= LIMIT


WORLD = 2


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(WORLD)
    yield world
    world.close()


def not_averaged(gradient: Tensor) -> Tensor:
    return gradient


def on_rank(rank: int, group: Any, folder: Path, how: str, options: dict[str, Any], mutant: Any = None) -> Tensors:
    as_rank(rank, WORLD)
    averaged = ours._averaged
    if mutant is not None:
        ours._averaged = mutant
    if "algorithm" in options:
        options = {"process_group": Exchange(group, options["algorithm"]), "gather_across_devices": True}
    try:
        found, _ = train(functools.partial(make, how=how, **options), folder, pairs(negatives=1), batch=4)
    finally:
        ours._averaged = averaged
    return found


@pytest.fixture(scope="module")
def joined(folders: dict[str, Path]) -> Tensors:
    """Plain torch on the joined batch, in one process."""
    return train(Materialised, folders["texts"], pairs(negatives=1))[0]


@pytest.mark.parametrize("how", ["whole", "cached"])
@pytest.mark.parametrize("options", [{"gather_across_devices": True}, {"algorithm": "gather"}], ids=str)
def test_two_processes_are_one_with_the_joined_batch(
    ranks: Ranks, folders: dict[str, Path], joined: Tensors, how: str, options: dict[str, Any]
) -> None:
    found = ranks.run(WORLD, on_rank, folders["texts"], how, options)
    print(f"{how}: {max(worst(t, joined) for t in found):.1e}")
    assert max(worst(t, joined) for t in found) <= LIMIT


@pytest.mark.parametrize("how", ["whole", "cached"])
def test_what_stays_on_a_rank_is_noticed(ranks: Ranks, folders: dict[str, Path], joined: Tensors, how: str) -> None:
    """Texts that are not gathered; gradients of scale and bias that are not averaged."""
    at_home = ranks.run(WORLD, on_rank, folders["texts"], how, {})
    assert at_home[0]["logit_bias"] == at_home[1]["logit_bias"]
    assert max(worst(t, joined) for t in at_home) > 100 * LIMIT
    apart = ranks.run(WORLD, on_rank, folders["texts"], how, {"gather_across_devices": True}, not_averaged)
    assert apart[0]["logit_bias"] != apart[1]["logit_bias"]
    assert max(worst(t, joined) for t in apart) > LIMIT


def peak(rank: int, group: Any, folder: Path, kind: type[nn.Module]) -> int | None:
    """Bytes of a step of 4,096 pairs in mini-batches of 64, above the model and the batch."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)  # what is freed leaves the process, and does not hide in a heap
    model = load(folder).train()
    data = pairs(4096)
    batches = [[model.preprocess(data[name][:size]) for name in ("anchor", "positive")] for size in (128, 4096)]
    loss = kind(model, mini_batch_size=64)

    def step(columns: list[Any]) -> None:
        loss(columns, None).backward()

    step(batches[0])
    loss.zero_grad()
    return peak_bytes(functools.partial(step, batches[1]), torch.device("cpu"))


def test_a_step_takes_no_more_memory_than_the_cached_softmax(tmp_path: Path) -> None:
    folder = save(tmp_path, width=256, layers=1)
    found = []
    for kind in (CachedMultipleNegativesSigmoidLoss, CachedMultipleNegativesRankingLoss):
        world = Ranks(1)  # a process of its own, whose allocator kept nothing
        found += world.run(1, peak, folder, kind)
        world.close()
    if None in found:
        pytest.skip("the peak cannot be read here: no /proc/self/clear_refs")
    print(f"{found[0] / MIB:.1f} MiB, the library's softmax {found[1] / MIB:.1f} MiB")
    assert found[0] <= found[1]


def test_gathering_alone_is_no_gathering(folders: dict[str, Path]) -> None:
    make_loss = functools.partial(make, how="whole", gather_across_devices=True)
    assert worst(*(train(f, folders["texts"], pairs())[0] for f in (make_loss, Materialised))) <= LIMIT


def test_scalars_are_saved_apart(folders: dict[str, Path], tmp_path: Path) -> None:
    loss = make(load(folders["texts"]), "whole")
    torch.save(loss.scalars.state_dict(), tmp_path / "scalars.pt")
    assert torch.load(tmp_path / "scalars.pt").keys() == {"logit_scale", "logit_bias"}
    other = MultipleNegativesSigmoidLoss(load(folders["texts"]))
    other.scalars.load_state_dict(torch.load(tmp_path / "scalars.pt"))
    assert other.scalars.logit_bias == BIAS


def test_model_card(folders: dict[str, Path]) -> None:
    loss = make(load(folders["texts"]), "cached")
    assert loss.get_config_dict()["mini_batch_size"] == 3
    assert "zhai2023sigmoid" in loss.citation
    assert "gao2021gradcache" in loss.citation


def test_what_is_refused(folders: dict[str, Path]) -> None:
    model = load(folders["texts"])
    with pytest.raises(ValueError, match="equal_labels must be one of"):
        MultipleNegativesSigmoidLoss(model, equal_labels="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gather_across_devices is False"):
        MultipleNegativesSigmoidLoss(model, process_group=Exchange())
    with pytest.raises(ValueError, match="mini_batch_size must be above 0"):
        CachedMultipleNegativesSigmoidLoss(model, mini_batch_size=0)
    anchors, texts = model.preprocess(["w1", "w2"]), model.preprocess(["w3"])
    for how in ("whole", "cached"):
        for columns in ([anchors], [anchors, texts]):
            with pytest.raises(ValueError, match="expected anchors and as many positives"):
                make(model, how)(columns, None)
        for labels in (None, torch.tensor([0.0, 1.0])):
            with pytest.raises(ValueError, match="needs an integer label of each anchor"):
                make(model, how, equal_labels="ignored")([anchors, anchors], labels)


def test_no_gradient_no_second_embedding(folders: dict[str, Path]) -> None:
    loss = make(load(folders["texts"]), "cached")
    column = loss.model.preprocess(["w1", "w2", "w3", "w4"])
    with torch.no_grad():
        found = loss([column, column], None)
    assert not found.requires_grad
    torch.testing.assert_close(found, loss([column, column], None).detach())
    assert weights(loss).keys() >= {"logit_scale", "logit_bias"}
