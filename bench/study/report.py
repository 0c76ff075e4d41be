"""The study as Markdown: accuracies, languages, starts of the bias, learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bench.harness.tables import markdown_table
from bench.study import experiment
from bench.study.experiment import LOSSES, Outcome, Study
from bench.study.statistics import OutcomesBySeed, accuracy, better_loss


def markdown(results: Study) -> str:
    """The whole report; also printed to the terminal."""
    design, seeds = results.design, OutcomesBySeed(results)
    numbers = ", ".join(map(str, sorted({seed for outcomes in seeds.by_setting.values() for seed in outcomes})))
    held_out = len(experiment.load_digits(False).test_labels)
    sections = [
        "# Sigmoid against softmax on handwritten digits",
        ", ".join(f"{key} {value}" for key, value in results.about.items() if value),
        f"{design.examples:,} examples a run whatever the batch, apart from {design.stretched[0]:,} × "
        f"{design.stretched_examples // design.stretched[0]:,} steps; seeds {numbers or 'none yet'}; "
        f"accuracy in % of {held_out} held-out images, mean ± standard deviation over the seeds; differences, "
        "taken seed by seed, with the 95 % interval of their mean.",
        "## Zero-shot accuracy over all languages",
        comparison(seeds),
        "## By the captions' language (sigmoid / softmax)",
        languages(seeds),
        "## Start of sigmoid's bias",
        biases(seeds),
        "## Learning rates, by the accuracy on the validation images",
        learning_rates(results),
    ]
    return "\n\n".join(sections) + "\n"


def comparison(seeds: OutcomesBySeed) -> str:
    lines = []
    for labels, batch, examples in seeds.shared_settings():
        both = [seeds.outcomes(loss, labels, batch, examples).values() for loss in LOSSES]
        difference = seeds.difference(labels, batch, examples)
        assert difference is not None
        rates = [f"{next(iter(outcomes)).run.lr:.2g}" for outcomes in both]
        shown = f"{100 * difference.mean:+.1f} ± {100 * difference.half_width:.1f}".removesuffix(" ± nan")
        steps = f"{examples // batch:,}"
        accuracies = [str(accuracy(outcomes)) for outcomes in both]
        lines.append([labels, f"{batch:,}", steps, *rates, *accuracies, shown, better_loss(difference)])
    head = ["labels", "batch", "steps", *(f"lr, {loss}" for loss in LOSSES), *LOSSES, "sigmoid − softmax", "reads more"]
    return markdown_table(head, lines)


def languages(seeds: OutcomesBySeed) -> str:
    names = list(experiment.digits_example().LANGUAGES)
    lines = []
    for labels, batch, examples in seeds.shared_settings():
        both = [seeds.outcomes(loss, labels, batch, examples).values() for loss in LOSSES]
        cells = [" / ".join(str(accuracy(outcomes, name)) for outcomes in both) for name in names]
        lines.append([labels, f"{batch:,}", f"{examples // batch:,}", *cells])
    return markdown_table(["labels", "batch", "steps", *names], lines)


def biases(seeds: OutcomesBySeed) -> str:
    lines = []
    for labels, batch, bias, found in seeds.bias_outcomes():
        outcomes = list(found.values())
        steps = max(outcomes[0].curve)
        figures: list[Callable[[Outcome], float]] = [
            lambda o: o.curve[1],
            lambda o, last=steps: o.curve[last],  # type: ignore[misc]
            lambda o: o.logit_scale,
        ]
        means = [f"{statistics.fmean(map(figure, outcomes)):,.2f}" for figure in figures]
        end = "" if bias is None else f"{statistics.fmean(o.logit_bias or 0.0 for o in outcomes):.2f}"
        lines.append([labels, f"{batch:,}", bias_name(bias), *means, end, str(accuracy(outcomes))])
    return markdown_table(["labels", "batch", "b", "first loss", "last loss", "t, end", "b, end", "accuracy"], lines)


def bias_name(bias: float | None) -> str:
    return "none" if bias is None else f"{bias:.3g}".replace("-", "−")


def learning_rates(results: Study) -> str:
    lines = []
    for (loss, labels, batch), by_rate in experiment.validation_accuracy(results.outcomes).items():
        read = [f"{100 * by_rate[lr]:.1f}" if lr in by_rate else "" for lr in results.design.rates]
        lines.append([labels, f"{batch:,}", loss, *read])
    return markdown_table(["labels", "batch", "loss", *(f"{lr:g}" for lr in results.design.rates)], lines)
