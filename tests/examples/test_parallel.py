"""Under DDP and FSDP2 two processes, each with half of every batch, come to the weights of one with all of it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("sklearn")

from siglip_kernels import SigLipLoss, SigmoidLoss, sigmoid_loss
from siglip_kernels.distributed import Exchange
from siglip_kernels.testing import make_inputs, relative_l2
from tests.examples.test_example import ROOT, SCRIPT, script
from tests.ranks import Ranks, slices

WORLD = 2
STEPS = ["--steps", "20", "--threads", "1"]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    world = Ranks(WORLD)
    yield world
    world.close()


def largest_error(ours: Tensors, theirs: Tensors) -> float:
    """Relative L2, of the tensor where it is largest."""
    assert ours.keys() == theirs.keys()
    assert all(t.shape == theirs[name].shape for name, t in ours.items())
    return max(relative_l2(t, theirs[name]) for name, t in ours.items())


def without_key_biases(weights: Tensors) -> Tensors:
    """All that training determines.

    The bias of attention's keys adds the same to every logit of a query, which softmax does not see: its gradient is
    rounding error alone, and AdamW, which divides a gradient by its size, makes steps as long as any other's of it.
    """
    weights = dict(weights)
    for name in [name for name in weights if name.endswith("in_proj_bias")]:
        query, _, value = weights[name].chunk(3)
        weights[name] = torch.cat([query, value])
    return weights


@torch.no_grad()
def test_key_biases_do_nothing() -> None:
    tower = script().TextTower().double()
    tokens = script().tokenize(["eine 3", "손글씨"])
    before = tower(tokens)
    for name, weight in tower.named_parameters():
        if name.endswith("in_proj_bias"):
            weight.chunk(3)[1].normal_()
    assert relative_l2(tower(tokens), before) < 1e-13


class Started(NamedTuple):
    process: subprocess.Popen[str]
    saved: Path

    def result(self) -> tuple[Tensors, str]:
        """The weights, and what was printed."""
        printed, errors = self.process.communicate(timeout=180)
        assert self.process.returncode == 0, errors
        return torch.load(self.saved), printed


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """Both at once, for most of their time is that of imports."""
    folder = tmp_path_factory.mktemp("torchrun")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    started = {}
    for how in ("ddp", "fsdp"):
        arguments = [str(SCRIPT), *STEPS, "--parallel", how, "--save", str(folder / f"{how}.pt")]
        process = subprocess.Popen(command + arguments, env=environment, **pipes)
        started[how] = Started(process, folder / f"{how}.pt")
    yield started
    for each in started.values():
        each.process.terminate()
        each.process.wait()


@pytest.fixture(scope="module")
def one_process(torchrun: dict[str, Started], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, str]:
    """The same of one process, while the others run."""
    saved, printed, threads = tmp_path_factory.mktemp("one") / "one.pt", io.StringIO(), torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(printed):
        script().main([*STEPS, "--save", str(saved)])
    torch.set_num_threads(threads)
    return torch.load(saved), printed.getvalue()


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_script_under_torchrun(how: str, torchrun: dict[str, Started], one_process: tuple[Tensors, str]) -> None:
    """In float32, as the script is."""
    (weights, printed), (expected, alone) = torchrun[how].result(), one_process
    assert largest_error(without_key_biases(weights), without_key_biases(expected)) <= 1e-5
    # Printed once, and of the joined batch.
    of_both, of_one = (re.findall(r"step .*, loss +([0-9.]+)", text) for text in (printed, alone))
    assert len(of_both) == 10
    assert [float(loss) for loss in of_both] == pytest.approx([float(loss) for loss in of_one], rel=1e-4)


class Trained(NamedTuple):
    losses: list[float]
    weights: Tensors
    gradients: Tensors  # of the last step
    averaged: int  # elements of gradients that DDP has sent
    trainable: int  # elements of weights


def train(
    rank: int, group: Any, how: str = "ddp", algorithm: str | None = None, freeze: bool = False, **options: Any
) -> Trained:
    """The example's training in float64, where rounding excuses no difference. No algorithm: texts stay at home."""
    digits = script()
    torch.manual_seed(0)
    data = digits.Data(*(t.double() if t.is_floating_point() else t for t in digits.Data.load(torch.device("cpu"))))
    loss_fn = SigmoidLoss(10.0, -2.0, parameter_shape=(1,), **options)
    encoder = digits.DualEncoder(digits.ImageTower(), digits.TextTower(), loss_fn).double()
    if freeze:
        digits.train_classifier(encoder.image_tower, data.batches(10, 32, 1), 10, 3e-3)
        encoder.image_tower.requires_grad_(False)
    encoder.process_group = algorithm and Exchange(group, algorithm)
    model, sent = digits.parallel(encoder, how), []
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(sent, all_reduce_and_count)
    losses = digits.train("pairs", model, data.batches(20, 32, 0), 20, 3e-3)
    weights = digits.get_model_state_dict(model, options=digits.StateDictOptions(full_state_dict=True))
    trainable = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    return Trained(losses, weights, gradients(encoder), sum(sent), trainable)


def all_reduce_and_count(sent, bucket):  # DDP takes no annotations that are strings
    sent.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def gradients(model: nn.Module) -> Tensors:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def assert_same_training(ours: Trained, theirs: Trained) -> None:
    """Gradients too: AdamW does not see a factor that is common to all gradients of a weight."""
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-12, atol=0)
    assert largest_error(ours.weights, theirs.weights) <= 1e-8
    assert largest_error(without_key_biases(ours.weights), without_key_biases(theirs.weights)) <= 1e-12
    assert largest_error(without_key_biases(ours.gradients), without_key_biases(theirs.gradients)) <= 1e-12


@pytest.fixture(scope="module")
def alone() -> dict[bool, Trained]:
    """One process with every batch, by whether the image tower is frozen."""
    with torch.random.fork_rng(devices=[]):
        return {freeze: train(0, None, freeze=freeze) for freeze in (False, True)}


@pytest.mark.parametrize(
    ("how", "algorithm", "freeze"),
    [
        ("ddp", "ring", False),
        ("ddp", "gather", False),
        ("ddp", "ring", True),
        ("fsdp", "ring", False),
        ("fsdp", "gather", False),
        ("fsdp", "ring", True),
    ],
)
def test_example_in_float64(ranks: Ranks, alone: dict[bool, Trained], how: str, algorithm: str, freeze: bool) -> None:
    for ours in ranks.run(WORLD, train, how, algorithm, freeze):
        assert_same_training(ours, alone[freeze])
        # Of a frozen tower nothing travels.
        assert ours.averaged == (20 * ours.trainable if how == "ddp" else 0)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_texts_that_stay_at_home_make_other_weights(ranks: Ranks, alone: dict[bool, Trained], how: str) -> None:
    """The tests above can fail."""
    for ours in ranks.run(WORLD, train, how):
        assert largest_error(without_key_biases(ours.weights), without_key_biases(alone[False].weights)) > 0.1
        with pytest.raises(AssertionError):
            assert_same_training(ours, alone[False])


class Towers(nn.Module):
    """Returns what open_clip's models do, from a scale and a bias of shape (1,)."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower, self.text_tower = nn.Linear(7, 5), nn.Linear(9, 5)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.full((1,), 2.0)), nn.Parameter(torch.full((1,), -3.0))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.image_tower(images), self.text_tower(texts), self.logit_scale.exp(), self.logit_bias


def towers_gradients(rank: int, group: Any, how: str = "ddp", dist_impl: str | None = None, world: int = 1) -> Tensors:
    torch.manual_seed(0)
    towers = Towers().double()
    part = slices([12 // world] * world)[rank]
    images, texts = torch.randn(12, 7, dtype=torch.float64)[part], torch.randn(12, 9, dtype=torch.float64)[part]
    model = script().parallel(towers, how)
    SigLipLoss(rank=rank, world_size=world, dist_impl=dist_impl)(*model(images, texts)).backward()
    return gradients(towers)


@pytest.mark.parametrize("dist_impl", ["bidir", "gather"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_drop_in_outside_of_the_wrapped_model(ranks: Ranks, how: str, dist_impl: str) -> None:
    expected = towers_gradients(0, None)
    assert expected["logit_scale"].shape == expected["logit_bias"].shape == (1,)
    for ours in ranks.run(WORLD, towers_gradients, how, dist_impl, WORLD):
        assert largest_error(ours, expected) <= 1e-12


SIZES = [5, 12]  # of the parts of a batch


def wrapped_loss(rank: int, group: Any) -> Tensors:
    """SigmoidLoss itself under DDP: the gradients of the mean over a joined batch of uneven parts."""
    x, y, *_ = make_inputs(sum(SIZES), sum(SIZES), 6, torch.float64)
    part = slices(SIZES)[rank]
    x, y = x[part].clone().requires_grad_(), y[part].clone().requires_grad_()
    loss_fn = SigmoidLoss(reduction="sum").double()
    wrapped = DistributedDataParallel(loss_fn)
    loss = wrapped(x, y, process_group=group) * WORLD / sum(SIZES)
    loss.backward()
    return {**gradients(loss_fn), "x": x.grad / WORLD, "y": y.grad / WORLD}


def test_loss_itself_under_ddp_and_uneven_parts(ranks: Ranks) -> None:
    x, y, *_ = (t.requires_grad_() for t in make_inputs(sum(SIZES), sum(SIZES), 6, torch.float64))
    loss_fn = SigmoidLoss().double()
    ids = torch.arange(sum(SIZES))
    loss_fn(x, y, image_ids=ids, text_ids=ids).backward()
    for ours, part in zip(ranks.run(WORLD, wrapped_loss), slices(SIZES), strict=True):
        assert largest_error(ours, {**gradients(loss_fn), "x": x.grad[part], "y": y.grad[part]}) <= 1e-12


def sharded_parameter(rank: int, group: Any) -> str:
    model = script().parallel(Towers(), "fsdp")
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    try:
        sigmoid_loss(x, y, model.logit_scale.exp(), model.logit_bias, process_group=group)
    except TypeError as error:
        return str(error)
    return "taken"


def test_a_sharded_parameter_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(WORLD, sharded_parameter):
        assert "logit_scale must be a plain tensor" in message
        assert "DTensor" in message
