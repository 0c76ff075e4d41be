"""The loss inside Hugging Face's models against their own: its value, every gradient, and what training makes of them.

Depth is one layer a tower and the vocabulary 256 bytes; width, heads, patches and tokens are those of the published
models, but in the tests of bfloat16 and of training, which say so. Whole depths need a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from siglip_kernels import sigmoid_loss
from siglip_kernels.integrations import transformers as integration
from siglip_kernels.integrations.transformers import fuse_loss, unfuse_loss
from siglip_kernels.reference import sigmoid_loss_reference
from siglip_kernels.testing import relative_l2
from tests.integrations.hosts import (
    KINDS,
    SHAPES,
    TINY,
    Batch,
    Float32Products,
    Tensors,
    build,
    cast,
    gradients,
    is_key_bias,
    make_batch,
    parts,
    rows,
)

FLOAT32_LIMIT = 5e-6
CASES = [(kind, name) for kind in KINDS for name in SHAPES]
# Few tokens, so that many pairs take seconds: 4 patches an image, 16 bytes a text.
FEW_TOKENS = {name: dataclasses.replace(shape, side=2, length=16) for name, shape in SHAPES.items()}


def errors(ours: Tensors, theirs: Tensors) -> dict[str, float]:
    """Relative L2 by name, without the key biases."""
    assert ours.keys() == theirs.keys()
    return {name: relative_l2(ours[name], theirs[name]) for name in ours if not is_key_bias(name)}


def assert_float32(model: nn.Module, batch: Batch) -> None:
    """Loss and every gradient, that of the scale and of the bias too, are those of the model's own loss."""
    theirs = gradients(model, batch)
    ours = gradients(fuse_loss(model), batch)
    found = errors(ours, theirs)
    assert {"loss", "logit_scale", "logit_bias"} < found.keys()
    assert max(found.values()) <= FLOAT32_LIMIT, sorted(found.items(), key=lambda item: -item[1])[:5]

    # A key bias has no gradient: float64 says so, and in float32 it is rounding, to be seen beside the query's bias.
    gold = gradients(unfuse_loss(model).double(), cast(batch, torch.float64))
    for name in filter(is_key_bias, gold):
        beside = gold[name.replace("k_proj", "q_proj")].norm()
        assert gold[name].norm() <= 1e-12 * beside, name
        assert (ours[name] - gold[name]).norm() <= FLOAT32_LIMIT * beside, name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_float32(kind: str, name: str) -> None:
    """Photographs in full resolution: 196, 256 and 729 tokens."""
    shape = SHAPES[name]
    size = 3 if shape.side > 16 else 4
    assert_float32(build(kind, shape, 1), make_batch(kind, shape, size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regime", ["init", "trained"])
def test_float32_of_many_pairs(kind: str, regime: str) -> None:
    assert_float32(build(kind, TINY, 2, regime), make_batch(kind, TINY, 64))


WRONG = {
    "scale not exponentiated": ("sigmoid_loss", lambda x, y, t, b, **how: sigmoid_loss(x, y, t.log(), b, **how)),
    "bias subtracted": ("sigmoid_loss", lambda x, y, t, b, **how: sigmoid_loss(x, y, t, -b, **how)),
    "divided by the pairs": ("sigmoid_loss", lambda *given, **how: sigmoid_loss(*given, reduction="mean", **how)),
    "positives off by one": ("sigmoid_loss", lambda *given, **how: sigmoid_loss(*given, positive_offset=1, **how)),
    "not normalised": ("_normalize", lambda t: t),
    "a detached scale": ("sigmoid_loss", lambda x, y, t, b, **how: sigmoid_loss(x, y, t.detach(), b + 0 * t, **how)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_loss_is_found(kind: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, *WRONG[what])
    with pytest.raises(AssertionError):
        assert_float32(build(kind, TINY, 2), make_batch(kind, TINY, 8))


class Ran(NamedTuple):
    """A step in bfloat16, in float64."""

    loss: Tensor
    embeds: list[Tensor]  # of images and of texts, bfloat16 values
    upstream: list[Tensor]  # their gradients
    gradients: Tensors


def run_step(model: nn.Module, batch: Batch, factor: float = 1.0) -> Ran:
    """With the loss times ``factor``, which is divided out again: another rounding of the same."""
    model.zero_grad()
    with Float32Products():
        output = model(**batch)
        embeds = [output.image_embeds, output.text_embeds]
        for t in embeds:
            t.retain_grad()
        (output.loss * factor).backward()
    found = parts({name: p.grad.double() / factor for name, p in model.named_parameters()})
    upstream = [t.grad.double() / factor for t in embeds]
    return Ran(output.loss.detach().double(), [t.detach().double() for t in embeds], upstream, found)


class Gold:
    """The same model in float64, on the weights and the pixels as bfloat16 has them."""

    def __init__(self, model: Any, batch: Batch) -> None:
        self.model = unfuse_loss(copy.deepcopy(model)).double()
        output = self.model(**cast(batch, torch.float64))
        self.embeds = [output.image_embeds, output.text_embeds]
        output.loss.backward(retain_graph=True)
        self.gradients = parts({name: p.grad for name, p in self.model.named_parameters()})
        self.towers = {n: p for n, p in self.model.named_parameters() if n not in ("logit_scale", "logit_bias")}

    def through_towers(self, upstream: list[Tensor]) -> Tensors:
        """The towers' gradients for those of the embeddings: linear, and without a rounding in bfloat16."""
        found = torch.autograd.grad(self.embeds, list(self.towers.values()), upstream, retain_graph=True)
        return parts(dict(zip(self.towers, found, strict=True)))

    def of_the_loss(self, embeds: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss of embeddings as bfloat16 has them, and its gradients: the embeddings', the scale's, the bias's."""
        leaves = [t.detach().clone().requires_grad_() for t in (*embeds, self.model.logit_scale, self.model.logit_bias)]
        x, y, scale, bias = leaves
        loss = sigmoid_loss_reference(x, y, scale.exp(), bias)
        return loss.detach(), list(torch.autograd.grad(loss, leaves))


def loss_alone(ran: Ran, gold: Gold) -> dict[str, float]:
    """Errors of what we replace, given the embeddings that the towers made in bfloat16, which are common to both.

    The gradients of the embeddings are led through float64 towers: so an error is the loss's own, on every parameter.
    """
    loss, (dx, dy, dscale, dbias) = gold.of_the_loss(ran.embeds)
    right = gold.through_towers([dx, dy])
    wrong = gold.through_towers([ran.upstream[0] - dx, ran.upstream[1] - dy])
    found = {name: float(wrong[name].norm() / right[name].norm()) for name in right if not is_key_bias(name)}
    scalars = {"logit_scale": dscale, "logit_bias": dbias}
    found |= {name: relative_l2(ran.gradients[name], t) for name, t in scalars.items()}
    return {"loss": relative_l2(ran.loss, loss), **found}


def assert_bfloat16(model: nn.Module, batch: Batch) -> None:
    theirs, rounded = run_step(model, batch), [run_step(model, batch, factor) for factor in (1.1, 1.3)]
    ours = run_step(fuse_loss(model), batch)
    assert all(torch.equal(a, b) for a, b in zip(ours.embeds, theirs.embeds, strict=True))
    gold = Gold(model, batch)

    # The loss by itself: no margin.
    mine, other = loss_alone(ours, gold), loss_alone(theirs, gold)
    ratios = {name: mine[name] / other[name] for name in mine if mine[name] > 0}
    assert max(ratios.values()) <= 1, sorted(ratios.items(), key=lambda item: -item[1])[:5]
    assert mine["loss"] <= 1e-5

    # The whole model, whose own rounding is ten times the loss's. How far two errors of one thing lie apart is seen
    # where theirs is rounded otherwise; a scalar's error is one draw, of which nothing is to be said.
    ours_error, theirs_error = (tensors_alone(errors(ran.gradients, gold.gradients)) for ran in (ours, theirs))
    others = [tensors_alone(errors(ran.gradients, gold.gradients)) for ran in rounded]
    noise = max(other[name] / theirs_error[name] for other in others for name in other) - 1
    whole = {name: ours_error[name] / theirs_error[name] for name in ours_error}
    assert max(whole.values()) <= 1 + noise, (noise, sorted(whole.items(), key=lambda item: -item[1])[:5])
    assert sorted(whole.values())[len(whole) // 2] <= 1 + noise / 4


def tensors_alone(found: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in found.items() if name not in ("logit_scale", "logit_bias")}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bfloat16_is_no_worse_than_theirs(kind: str, name: str) -> None:
    """Late in training, 32 pairs of few tokens, weights in bfloat16."""
    shape = FEW_TOKENS[name]
    assert_bfloat16(build(kind, shape, 1, "trained").bfloat16(), cast(make_batch(kind, shape, 32), torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_at_the_start_of_training(kind: str) -> None:
    shape = FEW_TOKENS["base-patch16-224"]
    assert_bfloat16(build(kind, shape, 1).bfloat16(), cast(make_batch(kind, shape, 32), torch.bfloat16))


def rounded_scale(x: Tensor, y: Tensor, t: Tensor, b: Tensor, **how: Any) -> Tensor:
    return sigmoid_loss(x, y, t.bfloat16(), b, **how)


def test_a_rounded_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(logit_scale) in bfloat16, as theirs has it."""
    monkeypatch.setattr(integration, "sigmoid_loss", rounded_scale)
    model = build("siglip", TINY, 2, "trained").bfloat16()
    with pytest.raises(AssertionError):
        assert_bfloat16(model, cast(make_batch("siglip", TINY, 32), torch.bfloat16))


STEPS, PAIRS = 20, 16
OPTIMIZERS = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, 1e-3)}


def train(model: nn.Module, data: Batch, optimizer_name: str) -> Tensors:
    """Steps on pairs of their own."""
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**rows(data, slice(step * PAIRS, (step + 1) * PAIRS))).loss.backward()
        optimizer.step()
    return parts({name: p.detach() for name, p in model.named_parameters()})


def distance(ours: Tensors, theirs: Tensors) -> float:
    """Relative L2 over all of them."""
    return relative_l2(*(torch.cat([t[name].flatten() for name in sorted(t)]) for t in (ours, theirs)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_20_steps(kind: str, optimizer_name: str) -> None:
    """Two narrow layers a tower; SGD: over all weights. AdamW makes as long a step of a key bias's rounding as of any
    gradient, with either loss: those are left out, and every other weight is held to the limit by itself."""
    model, data = build(kind, TINY, 2), make_batch(kind, TINY, STEPS * PAIRS)
    begin = parts({name: p.detach().clone() for name, p in model.named_parameters()})
    ours, theirs = (train(m, data, optimizer_name) for m in (fuse_loss(copy.deepcopy(model)), model))
    assert distance(begin, theirs) >= 1e-3
    if optimizer_name == "sgd":
        assert distance(ours, theirs) <= 1e-5
    found = errors(ours, theirs)
    assert max(found.values()) <= 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_whole_depth_in_float32(kind: str, name: str) -> None:
    shape, device = SHAPES[name], torch.device("cuda")
    batch = make_batch(kind, shape, 16)
    assert_float32(build(kind, shape, shape.depth).to(device), cast(batch, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_whole_depth_in_bfloat16(kind: str, name: str) -> None:
    shape, device = SHAPES[name], torch.device("cuda")
    batch = cast(make_batch(kind, shape, 32), torch.bfloat16, device)
    assert_bfloat16(build(kind, shape, shape.depth, "trained").to(device, torch.bfloat16), batch)
