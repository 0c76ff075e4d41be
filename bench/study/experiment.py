"""Sigmoid against softmax over batch sizes, and the start of the bias, on real images: an experiment in small.

After Zhai et al. 2023, arXiv 2303.15343: every batch size sees the same number of examples under the same schedule. The
images, captions, losses and training are those of ``examples/train_digits.py``; the image tower is narrower, and the
text tower has no attention.

A batch is drawn from the pairs of an image and one of the 16 captions of its class, so above the number of images it
holds an image several times. Which of its pairs are positive is said in two ways, to both losses alike:

    pair     the pair itself alone, as in the paper; about a tenth of what is called negative is then true
    class    every caption of the image's class, which is the truth here

The learning rate of each loss, labels and batch is the one of ``Design.rates`` that reads the most of the validation
images, which are taken from the training images (mean of three seeds where the bias is varied, one elsewhere, none of
them among the results'); the smallest batch, whose steps take the longest, has that of the next by the square-root
rule. The test images are read once a run, in the end. Softmax starts at t = 1/0.07, sigmoid at t = 10 and, by pair,
b = −10, as published; by class at the log odds of a positive, −log 9. The bias alone is varied under the learning rate
of that start. Equal examples leave a large batch few steps: one batch is also given the steps, and the learning rate,
of a smaller.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import load_module
from bench.harness.environment import environment
from bench.harness.progress import Progress

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_digits.py"
LOSSES, LABELS = ("sigmoid", "softmax"), ("pair", "class")
PUBLISHED_BIAS = -10.0
# Of the learning rates' runs; those of the results count from 0.
SEARCH_SEEDS = (1000, 1001, 1002)
Cell = tuple[str, str, int]  # loss, labels, batch


@dataclass(frozen=True)
class Run:
    """One training."""

    loss: str  # of LOSSES
    labels: str  # of LABELS
    batch: int
    examples: int
    bias: float | None  # b at the start; None: no bias
    lr: float
    seed: int
    validation: bool = False  # trained without the validation images and read on them, to choose lr

    @property
    def cell(self) -> Cell:
        """What has a learning rate of its own."""
        return self.loss, self.labels, self.batch


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: Run
    accuracy: dict[str, float]  # zero-shot, by the captions' language
    curve: dict[int, float]  # the loss at steps 1, 2, 4, …
    logit_scale: float  # t in the end
    logit_bias: float | None
    seconds: float

    @property
    def mean_accuracy(self) -> float:
        """Over the languages."""
        return sum(self.accuracy.values()) / len(self.accuracy)


Rates = dict[Cell, float]


@dataclass(frozen=True)
class Design:
    """The whole experiment."""

    examples: int = 65_536  # seen by every run but the stretched
    batches: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    bias_batches: tuple[int, ...] = (256, 1024)  # of the batches, where the start of the bias is varied
    stretched: tuple[int, int] = (1024, 256)  # the first also has as many steps as the second, at the second's lr
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    image_width: int = 8
    text_width: int = 32

    def __post_init__(self) -> None:
        for batch in self.batches:
            if self.examples % batch:
                raise ValueError(f"examples must be a multiple of every batch, got {self.examples} and {batch}")
        if not set(self.bias_batches) <= set(self.batches):
            raise ValueError(f"bias_batches must be among batches, got {self.bias_batches} and {self.batches}")
        if not set(self.stretched) <= set(self.batches):
            raise ValueError(f"stretched must be among batches, got {self.stretched} and {self.batches}")

    def search(self) -> list[Run]:
        """The runs that choose the learning rates."""
        return [
            Run(*cell, self.examples, start_bias(*cell), lr, seed, validation=True)
            for cell in cells(self.batches[1:])
            for seed in SEARCH_SEEDS[: None if cell[2] in self.bias_batches else 1]
            for lr in self.rates
        ]

    def runs(self, seed: int, rates: Rates) -> list[Run]:
        """The runs of one seed: both losses at every batch; the other starts of sigmoid's bias; the stretched."""
        runs = [Run(*cell, self.examples, start_bias(*cell), rates[cell], seed) for cell in cells(self.batches)]
        for loss, labels, batch in cells(self.bias_batches):
            if loss == "sigmoid":
                start = loss, labels, batch, self.examples
                runs += [Run(*start, b, rates[loss, labels, batch], seed) for b in bias_starts(labels, batch)]
        batch, like = self.stretched
        for cell in cells((batch,)):
            runs.append(Run(*cell, self.stretched_examples, start_bias(*cell), rates[*cell[:2], like], seed))
        return list(dict.fromkeys(runs))

    @property
    def stretched_examples(self) -> int:
        batch, like = self.stretched
        return self.examples // like * batch


QUICK = Design(128, (16, 64), (64,), (64, 16), (3e-3, 1e-2), image_width=4, text_width=8)


def cells(batches: Sequence[int]) -> list[Cell]:
    """Both kinds of labels, both losses."""
    return [(loss, labels, batch) for labels in LABELS for batch in batches for loss in LOSSES]


def log_odds(labels: str, batch: int) -> float:
    """Of a positive pair among those of a batch."""
    return -math.log(batch - 1 if labels == "pair" else example().CLASSES - 1)


def start_bias(loss: str, labels: str, batch: int) -> float | None:
    """Of the comparison with softmax."""
    if loss == "softmax":
        return None
    return PUBLISHED_BIAS if labels == "pair" else log_odds(labels, batch)


def bias_starts(labels: str, batch: int) -> list[float | None]:
    return [PUBLISHED_BIAS, log_odds(labels, batch), 0.0, None]


def validated(outcomes: Sequence[Outcome]) -> dict[Cell, dict[float, float]]:
    """The mean accuracy on the validation images by cell and learning rate."""
    read: dict[Cell, dict[float, list[float]]] = {}
    for outcome in outcomes:
        run = outcome.run
        if run.validation:
            read.setdefault(run.cell, {}).setdefault(run.lr, []).append(outcome.mean_accuracy)
    return {cell: {lr: sum(v) / len(v) for lr, v in by_rate.items()} for cell, by_rate in read.items()}


def choose(outcomes: Sequence[Outcome], design: Design) -> Rates:
    """The learning rate of each cell that reads most of the validation images; of equals, the smaller."""
    best = {cell: max(sorted(by_rate), key=by_rate.__getitem__) for cell, by_rate in validated(outcomes).items()}
    smallest, following = design.batches[:2]
    factor = math.sqrt(smallest / following)
    return best | {(*cell[:2], smallest): factor * lr for cell, lr in best.items() if cell[2] == following}


@functools.cache
def example() -> ModuleType:
    """``examples/train_digits.py``, which needs scikit-learn."""
    return load_module(SCRIPT)


@functools.cache
def digits(validation: bool) -> Any:
    """``Data``; for validation its test images are a quarter of the training images, and the others are trained on."""
    from sklearn.model_selection import train_test_split

    data = example().Data.load(torch.device("cpu"))
    if not validation:
        return data
    images, labels = data.train_images, data.train_labels
    train, held = train_test_split(range(len(labels)), test_size=0.25, stratify=labels.tolist(), random_state=1)
    return example().Data(images[train], labels[train], images[held], labels[held], data.tokens)


class ByteTower(nn.Module):
    """Captions [B, CONTEXT] to L2-normalised features [B, FEATURES]: one hidden layer on every byte and its place,
    averaged over the caption; a batch's equal captions are read once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        script = example()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.1 * torch.randn(script.CONTEXT, width))
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU())
        self.projection = nn.Linear(2 * width, script.FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        captions, index = torch.unique(tokens, dim=0, return_inverse=True)
        kept = (captions != 0).unsqueeze(-1)
        hidden = self.hidden(self.embedding(captions) + self.position)
        features = self.projection((hidden * kept).sum(1) / kept.sum(1))
        return F.normalize(features, dim=-1).index_select(0, index)


def perform(run: Run, design: Design) -> Outcome:
    """Both losses of a seed, labels and batch start from the same towers and see the same batches."""
    begin = time.perf_counter()
    script, data = example(), digits(run.validation)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        image_tower = script.ImageTower(design.image_width)
        text_tower = ByteTower(design.text_width)
    loss_fn = script.SigmoidLoss(init_logit_bias=run.bias) if run.loss == "sigmoid" else script.ClipLoss()
    model = script.DualEncoder(image_tower, text_tower, loss_fn)
    steps = run.examples // run.batch
    batches = data.batches(steps, run.batch, run.seed)
    if run.labels == "pair":
        batches = (batch._replace(labels=torch.arange(run.batch)) for batch in batches)
    losses = script.train("", model, batches, steps, run.lr)
    return Outcome(
        run,
        script.zero_shot_accuracy(image_tower, text_tower, data),
        {step: losses[step - 1] for step in (2**k for k in range(steps.bit_length()))},
        loss_fn.logit_scale.exp().item(),
        None if loss_fn.logit_bias is None else loss_fn.logit_bias.item(),
        time.perf_counter() - begin,
    )


@dataclass
class Study:
    """The experiment as far as it has come."""

    design: Design
    about: dict[str, str]  # what the figures depend on
    outcomes: list[Outcome]

    @classmethod
    def resume(cls, design: Design, folder: Path) -> Study:
        """What ``folder`` has of this design; raises ValueError if that is of another."""
        path = folder / "study.json"
        if not path.exists():
            about = environment(torch.device("cpu")) | {"scikit-learn": version("scikit-learn")}
            return cls(design, about, [])
        saved = json.loads(path.read_text())
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in saved["design"].items()}
        found = Design(**fields)
        if found != design:
            raise ValueError(f"{path} must be of the same design, {design}, got {found}")
        outcomes = [
            Outcome(**o | {"run": Run(**o["run"]), "curve": {int(step): loss for step, loss in o["curve"].items()}})
            for o in saved["outcomes"]
        ]
        return cls(design, saved["about"], outcomes)

    def perform(self, runs: Sequence[Run], folder: Path) -> None:
        """Those of ``runs`` that are missing."""
        done = {outcome.run for outcome in self.outcomes}
        missing = [run for run in runs if run not in done]
        commit = environment(torch.device("cpu"))["commit"]
        if missing and commit not in self.about["commit"].split(", "):
            self.about["commit"] += f", {commit}"
        progress = Progress(len(missing))
        for run in missing:
            name = f"{run.loss} by {run.labels}, {run.examples // run.batch} steps of {run.batch}, "
            name += f"b {run.bias}, lr {run.lr:g}, seed {run.seed}"
            progress.show(name)
            self.outcomes.append(perform(run, self.design))
            self.write(folder)
            progress.finish(f"{name}: {self.outcomes[-1].mean_accuracy:.1%}")

    def write(self, folder: Path) -> Path:
        """study.json"""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "study.json"
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"
        # An interruption while writing leaves the old file.
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").replace(path)
        return path
