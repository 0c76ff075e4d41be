"""open_clip's own training script, model and loop included, comes to the same weights with our loss as with its own."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from siglip_kernels import SigLipLoss
from siglip_kernels.testing import relative_l2
from tests.examples.test_parallel import without_key_biases
from tests.ranks import Ranks

STEPS, BATCH = 20, 32
VOCABULARY, CONTEXT, IMAGE = 64, 12, 16
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": IMAGE, "patch_size": 4, "layers": 2, "width": 64, "head_width": 16},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 64, "heads": 4, "layers": 2},
}
SETTINGS = ["--siglip", "--epochs", "1", "--warmup", "2", "--lr", "1e-3", "--workers", "0", "--device", "cpu"]
Weights = dict[str, Tensor]


class Anything(type):
    """A class of any name, with classes of any name in it, to be called with anything."""

    def __new__(cls, name: str, bases: tuple[type, ...] = (), namespace: Any = ()) -> Any:
        accept = {"__init__": lambda self, *arguments, **named: None}
        return super().__new__(cls, name, bases, accept | dict(namespace))

    def __init__(cls, name: str, *rest: Any) -> None:
        super().__init__(name, (), {})

    def __getattr__(cls, name: str) -> Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty packages for those that open_clip imports to read and transform data, where they are missing."""

    NAMES = ("torchvision", "ftfy", "webdataset", "braceexpand", "pandas", "tqdm", "regex", "PIL", "huggingface_hub")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0]
        wanted = package in self.NAMES and (name == package or sys.modules[package].__loader__ is self)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: getattr(Anything("package"), name)  # type: ignore[method-assign]


def load(folder: Path) -> tuple[ModuleType, ModuleType]:
    """open_clip's training script and our integration, for the rest of this process's life."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        sys.meta_path.append(StandIns())
        config = folder / "tiny-vit.json"
        config.write_text(json.dumps(MODEL))
        importlib.import_module("open_clip").add_model_config(config)
    return importlib.import_module("open_clip_train.main"), importlib.import_module(
        "siglip_kernels.integrations.open_clip"
    )


class Loader:
    """A rank's part of the batches, as the script takes them from ``get_data``: images and the texts' tokens."""

    def __init__(self, rank: int, world_size: int, batches: int) -> None:
        self.rank, self.world_size, self.num_batches = rank, world_size, batches
        self.num_samples = batches * BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.num_batches):
            images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
            tokens = torch.randint(1, VOCABULARY - 1, (BATCH, CONTEXT), generator=generator)
            tokens[:, -1] = VOCABULARY - 1  # the end of a text is its largest token
            yield images[self.rank :: self.world_size], tokens[self.rank :: self.world_size]


class PreciseLoss(nn.Module):
    """What open_clip's loss would be without the rounding of autocast: its own, in float64."""

    def __init__(self, loss_fn: nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, output_dict: bool, **model_out: Tensor) -> dict[str, Tensor]:
        with torch.autocast("cpu", enabled=False):
            return self.loss_fn(**{name: t.double() for name, t in model_out.items()}, output_dict=output_dict)


def train(rank: int, group: Any, folder: Path, loss: str, flags: list[str]) -> tuple[str, Weights, Weights]:
    """One epoch by the script's ``main``: the class of the loss it trained with, its first weights and its last."""
    script, integration = load(folder)
    world_size, accum_freq = group.size(), int(dict(itertools.pairwise(flags)).get("--accum-freq", 1))
    data = SimpleNamespace(dataloader=Loader(rank, world_size, STEPS * accum_freq), set_epoch=lambda epoch: None)
    trained: list[tuple[nn.Module, str, Weights]] = []

    def train_one_epoch(model: nn.Module, data: Any, loss: nn.Module, *rest: Any, **named: Any) -> None:
        trained.append((model, type(loss).__module__, copy(model)))
        original(model, data, loss, *rest, **named)

    def place(args: Any) -> torch.device:
        args.rank, args.local_rank, args.world_size, args.distributed = rank, rank, world_size, world_size > 1
        return torch.device(args.device)

    def wrap(model: nn.Module, device_ids: Any) -> nn.Module:  # torch refuses the ids of a CPU
        return DistributedDataParallel(model)

    original, create_loss = script.train_one_epoch, script.create_loss
    losses = {"precise": lambda args: PreciseLoss(create_loss(args)), "no bias": lambda args: WithoutBias()}
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (script, "train_one_epoch", train_one_epoch),
            (script, "get_data", lambda *arguments, **named: {"train": data}),
            (script, "init_distributed_device", place),
            (script, "create_loss", losses.get(loss, create_loss)),
            (torch.nn.parallel, "DistributedDataParallel", wrap),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        argv = ["--model", "tiny-vit", "--dataset-type", "synthetic", "--logs", tempfile.mkdtemp(dir=folder)]
        argv += [*SETTINGS, "--batch-size", str(BATCH // world_size), *flags]
        (integration if loss == "ours" else script).main(argv)
    ((model, where, first),) = trained
    return where, first, copy(model)


class WithoutBias(SigLipLoss):
    """Wrong, to see that the comparison notices."""

    def forward(self, *features: Any, logit_bias: Any, **named: Any) -> Any:
        return super().forward(*features, **named)


def copy(model: nn.Module) -> Weights:
    return {name.removeprefix("module."): weight.detach().clone() for name, weight in model.named_parameters()}


def difference(ours: Weights, theirs: Weights) -> tuple[float, float, str]:
    """Relative L2 over all weights together; of the worst parameter that training determines, and its name."""
    assert ours.keys() == theirs.keys()
    determined = without_key_biases(theirs)
    errors = {name: relative_l2(weight, determined[name]) for name, weight in without_key_biases(ours).items()}
    worst = max(errors, key=lambda name: errors[name])
    together = [torch.cat([w.double().flatten() for w in weights.values()]) for weights in (ours, theirs)]
    return relative_l2(*together), errors[worst], worst


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes of their own: open_clip and the stand-ins stay in them."""
    world = Ranks(2)
    yield world
    world.close()


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, []),
        (1, ["--accum-freq", "3"]),
        (2, []),
        (2, ["--accum-freq", "2", "--loss-dist-impl", "shift"]),
        (2, ["--grad-clip-norm", "0.5", "--loss-dist-impl", "reduce"]),
        (2, ["--loss-dist-impl", "gather"]),
    ],
    ids=str,
)
def test_training_script_comes_to_the_same_weights(
    ranks: Ranks, open_clip_folder: Path, size: int, flags: list[str]
) -> None:
    flags = ["--precision", "fp32", *flags]
    ours, theirs = (ranks.run(size, train, open_clip_folder, loss, flags) for loss in ("ours", "theirs"))
    for (used, first, last), (rival, *_, their_last) in zip(ours, theirs, strict=True):
        assert (used, rival) == ("siglip_kernels.drop_in", "open_clip.loss")
        error, worst, name = difference(last, their_last)
        moved = difference(last, first)[0]
        print(f"{size} {flags}: {error:.1e}, worst {worst:.1e} of {name}, moved {moved:.1e}")
        assert error <= 1e-5
        assert worst <= 1e-5, name
        assert moved > 1e-2


def test_another_loss_makes_other_weights(ranks: Ranks, open_clip_folder: Path) -> None:
    """So the comparison above can fail."""
    right, wrong = (
        ranks.run(1, train, open_clip_folder, loss, ["--precision", "fp32"])[0][2] for loss in ("ours", "no bias")
    )
    assert difference(wrong, right)[0] > 1e-2


def test_under_autocast_no_further_from_the_precise_loss_than_theirs(ranks: Ranks, open_clip_folder: Path) -> None:
    """open_clip's loss forms bfloat16 logits there, so the two cannot be the same."""
    ours, theirs, precise = (
        ranks.run(1, train, open_clip_folder, loss, ["--precision", "amp_bf16"])[0][2]
        for loss in ("ours", "theirs", "precise")
    )
    error, rival = (difference(weights, precise) for weights in (ours, theirs))
    print(f"amp_bf16: {error}, open_clip's own {rival}")
    assert error[0] <= rival[0]


def factories(rank: int, group: Any, folder: Path) -> dict[str, tuple[Any, ...]]:
    """What ``create_loss`` and ``create_task`` make of the script's arguments: class, and settings of a SigLipLoss."""
    _, integration = load(folder)
    open_clip = importlib.import_module("open_clip")
    common = {"rank": 1, "world_size": 2, "local_loss": False, "gather_with_grad": True, "horovod": False}
    common |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0, "loss_dist_impl": "reduce"}
    made = {}
    for name, arguments in {
        "siglip": {"siglip": True, "distill": False, "model": "ViT-B-16"},
        "clip": {"siglip": False, "distill": False, "model": "ViT-B-16"},
        "coca": {"siglip": True, "distill": False, "model": "coca_ViT-B-32"},
        "distill": {"siglip": True, "distill": True, "model": "ViT-B-16"},
    }.items():
        args = SimpleNamespace(**common, **arguments)
        made[name] = described(integration.create_loss(args))
        # As that of git main: a module with the loss in it; a task for evaluation has none.
        task, model, teacher = nn.Module(), nn.Module(), nn.Module()
        task.loss = open_clip.create_loss(args)
        with mock.patch.object(open_clip, "create_task", create=True, return_value=task) as theirs:
            made[f"{name} task"] = described(integration.create_task(args, model, dist_model=teacher).loss)
            theirs.assert_called_once_with(args, model, dist_model=teacher)
            del task.loss
            assert not hasattr(integration.create_task(args, model=model), "loss")
    return made


def described(loss: nn.Module) -> tuple[Any, ...]:
    settings = (loss.rank, loss.world_size, loss.dist_impl) if type(loss) is SigLipLoss else ()
    return type(loss).__module__, type(loss).__name__, *settings


def test_factories(ranks: Ranks, open_clip_folder: Path) -> None:
    """Only a SigLipLoss is replaced; by one with its settings."""
    ((*_, made),) = [ranks.run(1, factories, open_clip_folder)]
    expected = {
        "siglip": ("siglip_kernels.drop_in", "SigLipLoss", 1, 2, "reduce"),
        "clip": ("open_clip.loss", "ClipLoss"),
        "coca": ("open_clip.loss", "CoCaLoss"),
        "distill": ("open_clip.loss", "DistillClipLoss"),
    }
    assert made == expected | {f"{name} task": value for name, value in expected.items()}


def script_without_factories(rank: int, group: Any, folder: Path) -> str:
    script, integration = load(folder)
    with mock.patch.object(script, "create_loss"):
        del script.create_loss
        try:
            integration.main([])
        except RuntimeError as error:
            return str(error)
        finally:
            script.create_loss = None  # for mock to take away
    return "no error"


def test_a_script_that_builds_its_loss_otherwise_is_refused(ranks: Ranks, open_clip_folder: Path) -> None:
    """Rather than trained with open_clip's own loss."""
    (message,) = ranks.run(1, script_without_factories, open_clip_folder)
    assert "create_loss or create_task" in message
    assert "3.3.0" in message
