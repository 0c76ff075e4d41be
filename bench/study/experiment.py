"""Sigmoid against softmax over batch sizes, and initial values of the bias, on real images: a small experiment.

After Zhai et al. 2023, arXiv 2303.15343: every batch size sees the same number of examples under the same schedule. The
images, captions, losses and training are those of ``examples/train_digits.py``; the image tower is narrower, and the
text tower has no attention.

A batch is drawn from pairs of an image and one of the 16 captions of its class, so a batch larger than the number of
images contains an image several times. Its positive pairs are labelled in two ways, the same for both losses:

    pair     only the pair itself, as in the paper; about a tenth of the negatives are then false negatives
    class    every caption of the image's class, which is correct here

The learning rate for each loss, labels and batch is the one of ``Design.rates`` with the highest accuracy on validation
images, which are split off the training images (mean of three seeds where the bias is varied, one elsewhere; the
results use other seeds). The smallest batch, which takes the most steps, gets the rate of the next by the square-root
rule. The test images are used once in a run, at its end. Softmax starts at t = 1/0.07, sigmoid at t = 10 and, by pair,
b = −10, as published; by class b starts at the log odds of a positive, −log 9. When the bias is varied, the learning
rate is that of this start. An equal number of examples leaves a large batch few steps, so one batch is also run with
the steps and the learning rate of a smaller one.
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
# Seeds of the learning-rate search; those of the results count from 0.
SEARCH_SEEDS = (1000, 1001, 1002)
Setting = tuple[str, str, int]  # loss, labels, batch


@dataclass(frozen=True)
class Run:
    """One training."""

    loss: str  # of LOSSES
    labels: str  # of LABELS
    batch: int
    examples: int
    bias: float | None  # initial b; None: no bias
    lr: float
    seed: int
    validation: bool = False  # trained without the validation images and evaluated on them, to choose lr

    @property
    def setting(self) -> Setting:
        """The key that has its own learning rate."""
        return self.loss, self.labels, self.batch


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    run: Run
    accuracy: dict[str, float]  # zero-shot, by the captions' language
    curve: dict[int, float]  # the loss at steps 1, 2, 4, …
    logit_scale: float  # t at the end
    logit_bias: float | None
    seconds: float

    @property
    def mean_accuracy(self) -> float:
        """Over the languages."""
        return sum(self.accuracy.values()) / len(self.accuracy)


LearningRates = dict[Setting, float]


@dataclass(frozen=True)
class Design:
    """The whole experiment."""

    examples: int = 65_536  # seen by every run except the stretched ones
    batches: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    bias_batches: tuple[int, ...] = (256, 1024)  # the batches for which the initial bias is varied
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
            Run(*setting, self.examples, initial_bias(*setting), lr, seed, validation=True)
            for setting in settings(self.batches[1:])
            for seed in SEARCH_SEEDS[: None if setting[2] in self.bias_batches else 1]
            for lr in self.rates
        ]

    def runs(self, seed: int, rates: LearningRates) -> list[Run]:
        """The runs of one seed: both losses at every batch, other initial biases of sigmoid, and the stretched runs."""
        runs = [
            Run(*setting, self.examples, initial_bias(*setting), rates[setting], seed)
            for setting in settings(self.batches)
        ]
        for loss, labels, batch in settings(self.bias_batches):
            if loss == "sigmoid":
                start = loss, labels, batch, self.examples
                runs += [Run(*start, b, rates[loss, labels, batch], seed) for b in initial_biases(labels, batch)]
        batch, like = self.stretched
        for loss, labels, _ in settings((batch,)):
            start = loss, labels, batch, self.stretched_examples
            runs.append(Run(*start, initial_bias(loss, labels, batch), rates[loss, labels, like], seed))
        return list(dict.fromkeys(runs))

    @property
    def stretched_examples(self) -> int:
        batch, like = self.stretched
        return self.examples // like * batch


QUICK = Design(128, (16, 64), (64,), (64, 16), (3e-3, 1e-2), image_width=4, text_width=8)


def settings(batches: Sequence[int]) -> list[Setting]:
    """Both kinds of labels, both losses."""
    return [(loss, labels, batch) for labels in LABELS for batch in batches for loss in LOSSES]


def log_odds(labels: str, batch: int) -> float:
    """The log odds that a pair of a batch is positive."""
    return -math.log(batch - 1 if labels == "pair" else digits_example().CLASSES - 1)


def initial_bias(loss: str, labels: str, batch: int) -> float | None:
    """The initial bias in the comparison with softmax."""
    if loss == "softmax":
        return None
    return PUBLISHED_BIAS if labels == "pair" else log_odds(labels, batch)


def initial_biases(labels: str, batch: int) -> list[float | None]:
    return [PUBLISHED_BIAS, log_odds(labels, batch), 0.0, None]


def validation_accuracy(outcomes: Sequence[Outcome]) -> dict[Setting, dict[float, float]]:
    """The mean accuracy on the validation images by setting and learning rate."""
    accuracies: dict[Setting, dict[float, list[float]]] = {}
    for outcome in outcomes:
        run = outcome.run
        if run.validation:
            accuracies.setdefault(run.setting, {}).setdefault(run.lr, []).append(outcome.mean_accuracy)
    return {setting: {lr: sum(v) / len(v) for lr, v in by_rate.items()} for setting, by_rate in accuracies.items()}


def choose_learning_rates(outcomes: Sequence[Outcome], design: Design) -> LearningRates:
    """For each setting the learning rate with the highest validation accuracy; of equal ones the smaller."""
    best = {
        setting: max(sorted(by_rate), key=by_rate.__getitem__)
        for setting, by_rate in validation_accuracy(outcomes).items()
    }
    smallest, following = design.batches[:2]
    factor = math.sqrt(smallest / following)
    return best | {(*setting[:2], smallest): factor * lr for setting, lr in best.items() if setting[2] == following}


@functools.cache
def digits_example() -> ModuleType:
    """``examples/train_digits.py``, which needs scikit-learn."""
    return load_module(SCRIPT)


@functools.cache
def load_digits(validation: bool) -> Any:
    """``Data``; for validation a quarter of the training images are the test images, and the rest is trained on."""
    from sklearn.model_selection import train_test_split

    data = digits_example().Data.load(torch.device("cpu"))
    if not validation:
        return data
    images, labels = data.train_images, data.train_labels
    train, held = train_test_split(range(len(labels)), test_size=0.25, stratify=labels.tolist(), random_state=1)
    return digits_example().Data(images[train], labels[train], images[held], labels[held], data.tokens)


class ByteTower(nn.Module):
    """Captions [B, CONTEXT] to L2-normalised features [B, FEATURES]: one hidden layer on every byte and its position,
    averaged over the caption; equal captions of a batch are encoded once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        script = digits_example()
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


def train(run: Run, design: Design) -> Outcome:
    """One training. With equal seed, labels and batch both losses start from the same towers and see the same data."""
    started = time.perf_counter()
    script, data = digits_example(), load_digits(run.validation)
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
        time.perf_counter() - started,
    )


@dataclass
class Study:
    """The experiment and its outcomes so far."""

    design: Design
    about: dict[str, str]  # the environment
    outcomes: list[Outcome]

    @classmethod
    def resume(cls, design: Design, folder: Path) -> Study:
        """The study saved in ``folder``, or a new one; ValueError if the saved one has another design."""
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

    def run_missing(self, runs: Sequence[Run], folder: Path) -> None:
        """Perform those of ``runs`` that have no outcome yet."""
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
            self.outcomes.append(train(run, self.design))
            self.write(folder)
            progress.advance(f"{name}: {self.outcomes[-1].mean_accuracy:.1%}")

    def write(self, folder: Path) -> Path:
        """study.json"""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "study.json"
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"
        # An interruption while writing leaves the old file.
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").replace(path)
        return path
