"""SigLipLoss against open_clip: its mathematics written out here, and its own published loss.py."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import load_module
from siglip_kernels import SigLipLoss
from siglip_kernels.testing import Inputs, differentiate, make_inputs, relative_l2

NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")
OUTPUTS = ("loss", *NAMES)
# (B, D): odd and ragged; a tower's width; just beyond one block of 1024; one pair, at the start of training only: at
# t = 117 its z = 117·u − 12.9 cancels to 3.5e-6 in the float32 of open_clip, which multiplies t into the features.
SHAPES = ((127, 33), (256, 768), (1030, 32))
CASES = [(1, 16, "init"), *((*shape, regime) for regime in ("init", "trained") for shape in SHAPES)]


def open_clip_mathematics(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
    """What open_clip 3.3.0 computes in one process."""
    logits = logit_scale * x @ y.T
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = 2 * torch.eye(x.shape[0], dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / x.shape[0]


def assert_close(loss_fn: Any, rival: Any, inputs: Inputs, what: str) -> None:
    """The loss and its four gradients within 3e-6 of the rival's."""
    ours, theirs = differentiate(loss_fn, inputs), differentiate(rival, inputs)
    errors = {name: relative_l2(a, b) for name, a, b in zip(OUTPUTS, ours, theirs, strict=True)}
    assert all(error <= 3e-6 for error in errors.values()), (what, errors)


@pytest.mark.parametrize(("B", "D", "regime"), CASES)
def test_the_mathematics_of_open_clip(B: int, D: int, regime: str) -> None:
    inputs = make_inputs(B, B, D, torch.float32, regime)
    assert_close(SigLipLoss(), open_clip_mathematics, inputs, f"{(B, D)} {regime}")


def test_without_bias() -> None:
    x, y, t, _ = make_inputs(20, 20, 8, torch.float64)
    assert relative_l2(SigLipLoss()(x, y, t, None), open_clip_mathematics(x, y, t, None)) < 1e-12


@pytest.fixture(scope="module")
def open_clip_loss(open_clip_loss_file: Path) -> ModuleType:
    return load_module(open_clip_loss_file)


@pytest.mark.parametrize(("B", "D", "regime"), CASES)
def test_open_clip_itself(open_clip_loss: ModuleType, B: int, D: int, regime: str) -> None:
    inputs = make_inputs(B, B, D, torch.float32, regime)
    assert_close(SigLipLoss(), open_clip_loss.SigLipLoss(), inputs, f"{(B, D)} {regime}")


def test_open_clip_itself_without_bias(open_clip_loss: ModuleType) -> None:
    x, y, t, _ = make_inputs(127, 127, 33, torch.float32)
    theirs = open_clip_loss.SigLipLoss()(x, y, t, None)
    assert relative_l2(SigLipLoss()(x, y, t, None), theirs) < 3e-6


def test_the_signatures_of_open_clip_itself(open_clip_loss: ModuleType) -> None:
    """Every parameter of theirs is one of ours, at the same place and with the same default."""
    for method in ("__init__", "forward"):
        theirs = list(inspect.signature(getattr(open_clip_loss.SigLipLoss, method)).parameters.values())
        ours = list(inspect.signature(getattr(SigLipLoss, method)).parameters.values())
        for a, b in zip(theirs, ours, strict=False):
            assert a.name == b.name, method
            assert a.default is inspect.Parameter.empty or a.default == b.default, (method, a)
        assert len(ours) >= len(theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        # open_clip 3.3.0's factory passes these; None is its default.
        {},
        {"rank": 0, "world_size": 1, "dist_impl": None},
        {"cache_labels": True, "rank": 0, "world_size": 1, "dist_impl": "gather"},
        # Its git main.
        {"cache_labels": True, "rank": 0, "world_size": 1, "dist_impl": "bidir", "chunk_size": 0},
        {"chunk_size": 4},
    ],
)
def test_calls_of_every_form(arguments: dict[str, Any]) -> None:
    loss_fn = SigLipLoss(**arguments)
    x, y, t, b = inputs = make_inputs(6, 6, 4, torch.float32)
    right = open_clip_mathematics(*inputs)
    model_out = dict(zip(NAMES, inputs, strict=True))
    results = [
        loss_fn(x, y, t, b),
        loss_fn(x, y, logit_scale=t, logit_bias=b),
        loss_fn(**model_out),
        loss_fn(x, y, t, b, False),
        loss_fn(x, y, t, b, True)["contrastive_loss"],
        loss_fn(**model_out, output_dict=True)["contrastive_loss"],
        loss_fn(x, y, t.reshape(1), b.reshape(1)),
    ]
    for result in results:
        assert result.shape == ()
        assert relative_l2(result, right) < 3e-6
    dictionary = loss_fn(**model_out, output_dict=True)
    assert list(dictionary) == ["contrastive_loss"]
    assert isinstance(loss_fn(**model_out), Tensor)


def test_positional_constructor() -> None:
    loss_fn = SigLipLoss(True, 0, 1, "shift", 2)
    assert (loss_fn.rank, loss_fn.world_size) == (0, 1)
    assert not list(loss_fn.parameters())
    assert not loss_fn.state_dict()


def test_two_processes_need_a_process_group() -> None:
    """At the first call: training scripts build their loss when they like."""
    loss_fn = SigLipLoss(world_size=2, rank=1)
    with pytest.raises(ValueError, match=r"world_size = 2 was given, but .*init_process_group was not called"):
        loss_fn(*make_inputs(4, 4, 8, torch.float32))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dist_impl": "ring"}, ["dist_impl", "'ring'", "'bidir'", "'shift'", "'reduce'", "'gather'"]),
        ({"dist_impl": 1}, ["dist_impl", "1", "'bidir'"]),
        ({"rank": 1}, ["rank", "1", "world_size"]),
        ({"rank": -1}, ["rank", "-1"]),
        ({"world_size": 0}, ["world_size", "0"]),
        ({"chunk_size": -1}, ["chunk_size", "-1", "0"]),
    ],
)
def test_bad_constructor_arguments(arguments: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))) as caught:
        SigLipLoss(**arguments)
    assert all(words in str(caught.value) for words in says), caught.value


@pytest.mark.parametrize("spoilt", ["image_features", "text_features", "logit_scale"])
def test_nothing_is_hidden_from_the_caller(spoilt: str) -> None:
    """A NaN reaches the training loop's own check, as with open_clip."""
    inputs = dict(zip(NAMES, make_inputs(6, 6, 4, torch.float32), strict=True))
    inputs[spoilt].view(-1)[-1] = float("nan")
    assert SigLipLoss()(**inputs).isnan()
