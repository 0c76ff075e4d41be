"""A fused model goes where theirs goes: copies, files, compilers; it holds no logits."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import Siglip2Model, SiglipModel

from bench.harness.timing import MIB, peak_bytes
from siglip_kernels.integrations.transformers import fuse_loss, unfuse_loss
from siglip_kernels.testing import relative_l2
from tests.integrations.hosts import KINDS, TINY, Batch, build, cast, gradients, make_batch, rows

LOGITS = ("logits_per_image", "logits_per_text")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> Any:
    return build(kind, TINY, 2)


@pytest.fixture
def batch(kind: str) -> Batch:
    return make_batch(kind, TINY, 6)


def flat(output: Any) -> list[Any]:
    """Tensors and absences, in order, of an output or a tuple."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    nested = [isinstance(value, tuple) or hasattr(value, "to_tuple") for value in values]
    return [t for value, more in zip(values, nested, strict=True) for t in (flat(value) if more else [value])]


def assert_equal(ours: Any, theirs: Any) -> None:
    """Bit by bit."""
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_same_but_loss(ours: Any, theirs: Any) -> None:
    """The loss, which comes first, to rounding; the rest bit by bit."""
    (mine, *rest), (loss, *others) = flat(ours), flat(theirs)
    assert mine.dtype is loss.dtype
    assert mine.shape == loss.shape == ()
    assert relative_l2(mine, loss) <= 1e-6
    assert_equal(tuple(rest), tuple(others))


def test_without_return_loss_it_is_theirs(model: Any, batch: Batch) -> None:
    for return_loss in (None, False):
        given = {**batch, "return_loss": return_loss}
        theirs = model(**given)
        ours = fuse_loss(model)(**given)
        assert type(ours) is type(theirs)
        assert ours.logits_per_image is not None
        assert_equal(ours, theirs)
        assert_equal(model(**given, return_dict=False), theirs.to_tuple())
        unfuse_loss(model)


@pytest.mark.parametrize(
    "asked",
    [{}, {"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": True}, {"return_dict": False}],
)
def test_with_logits_all_is_theirs(model: Any, batch: Batch, asked: dict[str, bool]) -> None:
    if "output_attentions" in asked:
        model.set_attn_implementation("eager")
    theirs = model(**batch, **asked)
    ours = fuse_loss(model, return_logits=True)(**batch, **asked)
    assert type(ours) is type(theirs)
    assert_same_but_loss(ours, theirs)


def test_logits_are_left_out(model: Any, batch: Batch) -> None:
    theirs = model(**batch)
    ours = fuse_loss(model)(**batch)
    assert type(ours) is type(theirs)
    assert [name for name in theirs if name not in ours] == list(LOGITS)
    assert ours.logits_per_image is ours.logits_per_text is None
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    without = tuple(t for name, t in theirs.items() if name not in LOGITS)
    assert_same_but_loss(as_tuple, without)
    model.config.return_dict = False
    assert_same_but_loss(model(**batch), without)
    assert list(model(**batch, return_dict=True)) == list(ours)


def test_positional_arguments_and_other_sizes() -> None:
    model, batch = build("siglip", TINY, 2), make_batch("siglip", TINY, 4)
    pixels = torch.nn.functional.interpolate(batch["pixel_values"], scale_factor=2.0)
    given = (batch["input_ids"], pixels, torch.ones_like(batch["input_ids"]), None, True, True)
    theirs = model(*given)
    assert_same_but_loss(fuse_loss(model, return_logits=True)(*given), theirs)


def test_the_signature_is_theirs(kind: str, model: Any) -> None:
    """By it the Trainer chooses the columns of a data set."""
    host = {"siglip": SiglipModel, "siglip2": Siglip2Model}[kind]
    ours, theirs = (inspect.signature(f).parameters.values() for f in (fuse_loss(model).forward, model._host.forward))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs][1:]
    assert type(model).__name__ == host.__name__
    assert isinstance(model, host)


def test_copies_and_files(model: Any, batch: Batch, tmp_path: Path) -> None:
    theirs, keys = model(**batch), list(model.state_dict())
    loss = fuse_loss(model)(**batch).loss
    assert list(model.state_dict()) == keys
    torch.save(model, tmp_path / "model.pt")
    copies = [copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))]
    for other in [*copies, torch.load(tmp_path / "model.pt", weights_only=False)]:
        assert type(other) is type(model)
        found = other(**batch)
        assert found.logits_per_image is None
        assert torch.equal(found.loss, loss)
    unfuse_loss(copies[0])
    assert_equal(copies[0](**batch), theirs)
    assert model(**batch).logits_per_image is None  # a copy's own affair
    model.save_pretrained(tmp_path)
    loaded = model._host.from_pretrained(tmp_path)
    assert loaded.config.architectures == [model._host.__name__]
    assert type(loaded) is model._host
    assert_equal(loaded(**batch), theirs)


def test_fused_twice_and_unfused(model: Any, batch: Batch) -> None:
    host, theirs = type(model), model(**batch)
    held = set(vars(model))
    assert unfuse_loss(model) is model
    assert fuse_loss(model, return_logits=True) is model
    assert fuse_loss(model) is model
    assert model(**batch).logits_per_image is None  # the last call's arguments
    assert unfuse_loss(model) is unfuse_loss(model) is model
    assert type(model) is host
    assert set(vars(model)) == held
    assert_equal(model(**batch), theirs)


class Kept(SiglipModel):
    pass


class Changed(SiglipModel):
    def forward(self, *given: Any, **kwargs: Any) -> Any:
        return super().forward(*given, **kwargs)


def test_subclasses() -> None:
    model, batch = build("siglip", TINY, 2), make_batch("siglip", TINY, 4)
    model.__class__ = Kept
    assert fuse_loss(model)(**batch).logits_per_image is None
    assert isinstance(model, Kept)
    assert type(pickle.loads(pickle.dumps(model))) is type(model)
    assert type(unfuse_loss(model)) is Kept
    model.__class__ = Changed
    with pytest.raises(TypeError, match=r"forward of SiglipModel.*test_transformers_use\.Changed has its own"):
        fuse_loss(model)


@pytest.mark.parametrize("function", [fuse_loss, unfuse_loss])
def test_another_model_is_refused(function: Any) -> None:
    model = build("siglip", TINY, 2)
    says = "model must be a SiglipModel or Siglip2Model, got "
    for other, named in ((nn.Linear(2, 2), "Linear"), (None, "NoneType"), (model.text_model, "SiglipTextModel")):
        with pytest.raises(TypeError, match=rf"{says}.*{named}$"):
            function(other)
    with pytest.raises(TypeError, match=rf"{says}.*DataParallel; give the model that it wraps"):
        function(nn.DataParallel(model))
    with pytest.raises(TypeError, match="give the model that it wraps"):
        function(torch.compile(model))


def test_a_replaced_forward_is_refused(model: Any) -> None:
    model.forward = partial(type(model).forward, model)
    with pytest.raises(ValueError, match=r"model\.forward was replaced on this instance"):
        fuse_loss(model)
    del model.forward
    fuse_loss(model).forward = model.forward
    with pytest.raises(ValueError, match="unfuse_loss after it is undone"):
        unfuse_loss(model)


def test_as_many_images_as_texts(model: Any, batch: Batch) -> None:
    fuse_loss(model)
    with pytest.raises(ValueError, match="pixel_values hold 6 images, input_ids 5 texts"):
        model(**{**batch, "input_ids": batch["input_ids"][:5]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(model: Any, batch: Batch, dtype: torch.dtype) -> None:
    model, batch = model.to(dtype), cast(batch, dtype)
    theirs = gradients(model, batch)
    ours = gradients(fuse_loss(model), batch)
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    assert relative_l2(ours["loss"], theirs["loss"]) <= limit
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}


def test_autocast(model: Any, batch: Batch) -> None:
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch)

    theirs = run()
    fuse_loss(model)
    ours = run()
    assert ours.loss.dtype is theirs.loss.dtype is torch.float32
    assert relative_l2(ours.loss, theirs.loss) <= 1e-2
    assert torch.equal(ours.text_embeds, theirs.text_embeds)
    ours.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled_in_one_graph(model: Any, batch: Batch) -> None:
    plain = gradients(fuse_loss(model), batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    output = compiled(**batch)
    output.loss.backward()
    assert output.logits_per_image is None
    assert relative_l2(output.loss, plain["loss"]) <= 1e-6
    assert relative_l2(model.logit_scale.grad, plain["logit_scale"]) <= 1e-5
    weight = model.vision_model.head.mlp.fc1.weight.grad
    assert relative_l2(weight, plain["vision_model.head.mlp.fc1.weight"]) <= 1e-5


def test_gradient_checkpointing(model: Any, batch: Batch) -> None:
    fuse_loss(model).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    again = gradients(model, batch)
    assert all(torch.equal(again[name], t) for name, t in plain.items())


def test_no_logits_are_kept_or_formed(kind: str, model: Any) -> None:
    """Autograd keeps no tensor of as many elements as there are pairs; a step never holds them."""
    batch = make_batch(kind, TINY, 40)

    def sizes_kept() -> set[int]:
        kept: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            model(**batch)
        return kept

    assert 1600 in sizes_kept()
    fuse_loss(model)
    assert 1600 not in sizes_kept()


def test_memory_of_many_pairs() -> None:
    """8,192 pairs, whose logits alone take 256 MiB."""
    model, few = fuse_loss(build("siglip", TINY, 1)), make_batch("siglip", TINY, 16)
    many = rows(few, torch.arange(8192) % 16)
    outputs = model(**few)
    embeds = [outputs.vision_model_output.pooler_output, outputs.text_model_output.pooler_output]
    pooled = [t.detach()[torch.arange(8192) % 16].requires_grad_() for t in embeds]
    # The towers' own memory is no question here.
    model.vision_model.forward = lambda **given: type(outputs.vision_model_output)(pooler_output=pooled[0])
    model.text_model.forward = lambda **given: type(outputs.text_model_output)(pooler_output=pooled[1])
    step = lambda: model(**many).loss.backward()  # noqa: E731
    step()
    taken = peak_bytes(step, torch.device("cpu"))
    if taken is None:
        pytest.skip("the system tells no peak memory")
    assert taken < 128 * MIB
