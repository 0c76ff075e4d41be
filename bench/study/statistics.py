"""Statistics of the study over seeds, and differences of the losses seed by seed.

Both losses of a seed start from the same towers and see the same batches. Intervals are Student's, of 95 %, over the
seeds; seeds change towers and batches, not which images are held out. Nothing is corrected for the number of
comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.study import experiment
from bench.study.experiment import LABELS, LOSSES, Outcome, Study


class Spread(NamedTuple):
    """Statistics of one value over seeds."""

    mean: float
    sd: float  # of the sample; NaN for one seed
    low: float
    high: float
    half_width: float  # of Student's 95 % interval of the mean; NaN for one seed

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.sd) else f" ± {100 * self.sd:.1f}")


def spread(values: Sequence[float]) -> Spread:
    from scipy.stats import t

    n, mean = len(values), statistics.fmean(values)
    sd = statistics.stdev(values) if n > 1 else math.nan
    half_width = float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return Spread(mean, sd, min(values), max(values), half_width)


class OutcomesBySeed:
    """The outcomes without the learning-rate search, grouped by everything but the seed."""

    def __init__(self, results: Study) -> None:
        self.design = results.design
        self.by_setting: dict[tuple[str, str, int, int, float | None], dict[int, Outcome]] = {}
        for outcome in results.outcomes:
            run = outcome.run
            if not run.validation:
                self.by_setting.setdefault((*run.setting, run.examples, run.bias), {})[run.seed] = outcome

    def outcomes(self, loss: str, labels: str, batch: int, examples: int | None = None) -> dict[int, Outcome]:
        """Outcomes by seed, with the initial bias of the comparison."""
        start = experiment.initial_bias(loss, labels, batch)
        return self.by_setting.get((loss, labels, batch, examples or self.design.examples, start), {})

    def difference(self, labels: str, batch: int, examples: int | None = None) -> Spread | None:
        """Accuracy of sigmoid minus that of softmax, over the seeds that both have."""
        sigmoid, softmax = (self.outcomes(loss, labels, batch, examples) for loss in LOSSES)
        values = [sigmoid[seed].mean_accuracy - softmax[seed].mean_accuracy for seed in sigmoid if seed in softmax]
        return spread(values) if values else None

    def bias_outcomes(self) -> list[tuple[str, int, float | None, dict[int, Outcome]]]:
        """(labels, batch, initial bias of sigmoid, outcomes by seed), where there are any."""
        return [
            (labels, batch, bias, found)
            for labels in LABELS
            for batch in self.design.bias_batches
            for bias in experiment.initial_biases(labels, batch)
            if (found := self.by_setting.get(("sigmoid", labels, batch, self.design.examples, bias)))
        ]

    def shared_settings(self) -> list[tuple[str, int, int]]:
        """(labels, batch, examples) for which both losses have a common seed; the stretched ones come last."""
        shapes = [(batch, self.design.examples) for batch in self.design.batches]
        shapes.append((self.design.stretched[0], self.design.stretched_examples))
        return [(labels, *shape) for labels in LABELS for shape in shapes if self.difference(labels, *shape)]


def accuracy(outcomes: Iterable[Outcome], language: str | None = None) -> Spread:
    """Accuracy in one language, or averaged over all."""
    return spread([o.accuracy[language] if language else o.mean_accuracy for o in outcomes])


def better_loss(difference: Spread) -> str:
    """The loss with the higher accuracy, if the interval of the difference excludes 0."""
    if math.isnan(difference.half_width):
        return "one seed"
    if not abs(difference.mean) > difference.half_width:
        return "within the spread"
    return LOSSES[0] if difference.mean > 0 else LOSSES[1]
