"""The figure of the study: error against batch, by loss and language, and the effect of the initial bias."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.harness.figures import pyplot
from bench.study import experiment
from bench.study.experiment import LABELS, LOSSES, Study
from bench.study.statistics import OutcomesBySeed, accuracy, spread

NAMES = {"pair": "labels by pair, as in the paper", "class": "labels by class"}
# Okabe and Ito's palette, for colour-blind readers.
COLOURS = {"sigmoid": "#0072B2", "softmax": "#D55E00"}
LANGUAGE_STYLES = ("-", "--", "-.", ":")
# By initial bias; the last two hardly differ, so one is dashed.
BIAS_STYLES = (("−10", "#0072B2", "-"), ("log odds", "#009E73", "-"), ("0", "#E69F00", "-"), ("none", "#000000", "--"))
BATCH_COLOURS = ("#56B4E9", "#CC79A7", "#000000")


def plot(results: Study, folder: Path) -> list[Path]:
    """study.png, a row for each kind of labels; nothing without matplotlib or before both losses have a seed."""
    plt, seeds = pyplot(), OutcomesBySeed(results)
    if plt is None or not seeds.shared_settings():
        return []
    figure, rows = plt.subplots(2, 4, figsize=(20, 9), sharex="col", squeeze=False)
    for labels, axes in zip(LABELS, rows, strict=True):
        _plot_losses(axes[0], seeds, labels)
        _plot_languages(axes[1], seeds, labels)
        _plot_curves(axes[2], seeds, labels)
        _plot_initial_biases(axes[3], seeds, labels)
        axes[0].set_ylabel(f"{NAMES[labels]}\nzero-shot error, %", fontsize=11)
    for axis in rows[1][:2]:
        axis.set_xticks(results.design.batches, [f"{batch:,}" for batch in results.design.batches])
        axis.set_xlabel("batch (every batch sees as many examples)")
    rows[1][2].set_xlabel("step")
    rows[1][3].set_xlabel("b at the start")
    about, count = results.about, len({seed for found in seeds.by_setting.values() for seed in found})
    figure.suptitle(
        f"Handwritten digits, {results.design.examples:,} examples a run, {count} seeds (line: mean, band: range); "
        f"torch {about['torch']}, commit {about['commit'].split(', ')[-1] or 'unknown'}, {about['date']}",
        fontsize=11,
    )
    figure.tight_layout()
    path = folder / "study.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return [path]


def _plot_losses(axis: Any, seeds: OutcomesBySeed, labels: str) -> None:
    """The error over all languages against batch."""
    for loss in LOSSES:
        shown = {
            B: accuracy(found.values()) for B in seeds.design.batches if (found := seeds.outcomes(loss, labels, B))
        }
        errors = {batch: [100 * (1 - v) for v in (s.mean, s.low, s.high)] for batch, s in shown.items()}
        _plot_line(axis, errors, loss, COLOURS[loss])
        batch, like = seeds.design.stretched
        stretched = seeds.outcomes(loss, labels, batch, seeds.design.stretched_examples)
        if stretched:
            s, label = accuracy(stretched.values()), f"{loss}, with the steps of batch {like:,}"
            mean, low, high = (100 * (1 - v) for v in (s.mean, s.low, s.high))
            bars = [[mean - high], [low - mean]]
            axis.errorbar(batch, mean, bars, fmt="D", mfc="white", capsize=3, color=COLOURS[loss], label=label)
    _error_axis(axis, "sigmoid against softmax, all languages")


def _plot_languages(axis: Any, seeds: OutcomesBySeed, labels: str) -> None:
    """The mean error in each language against batch."""
    for loss in LOSSES:
        for language, style in zip(experiment.digits_example().LANGUAGES, LANGUAGE_STYLES, strict=True):
            found = {B: seeds.outcomes(loss, labels, B).values() for B in seeds.design.batches}
            means = {B: 100 * (1 - accuracy(o, language).mean) for B, o in found.items() if o}
            label = f"{language}, {loss}"
            axis.plot(list(means), list(means.values()), style, color=COLOURS[loss], label=label, linewidth=1.3)
    _error_axis(axis, "by the captions' language (means)")


def _plot_curves(axis: Any, seeds: OutcomesBySeed, labels: str) -> None:
    """Sigmoid's loss against steps for each initial bias, at the smallest batch where it is varied."""
    smallest = min(seeds.design.bias_batches)
    runs = {bias: found for label, B, bias, found in seeds.bias_outcomes() if (label, B) == (labels, smallest)}
    for bias, (name, colour, style) in zip(experiment.initial_biases(labels, smallest), BIAS_STYLES, strict=True):
        shown: dict[int, list[float]] = {}
        for outcome in runs.get(bias, {}).values():
            for step, loss in outcome.curve.items():
                shown.setdefault(step, []).append(loss)
        spreads = {step: spread(losses) for step, losses in shown.items()}
        value = f" = {bias:.2f}".replace("-", "−") if name == "log odds" else ""
        _plot_line(
            axis, {step: [s.mean, s.low, s.high] for step, s in spreads.items()}, f"b: {name}{value}", colour, style
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(title=f"sigmoid's loss, batch {smallest:,}", ylabel="loss (sum over pairs / batch)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plot_initial_biases(axis: Any, seeds: OutcomesBySeed, labels: str) -> None:
    """The error for each initial bias: a dot for each seed, a bar for their mean."""
    batches = seeds.design.bias_batches
    for index, (batch, colour) in enumerate(zip(batches, BATCH_COLOURS, strict=False)):
        starts = {bias: found for label, B, bias, found in seeds.bias_outcomes() if (label, B) == (labels, batch)}
        shift = 0.3 * (index - (len(batches) - 1) / 2)
        for place, bias in enumerate(experiment.initial_biases(labels, batch)):
            errors = [100 * (1 - o.mean_accuracy) for o in starts.get(bias, {}).values()]
            if errors:
                label = f"batch {batch:,}" if place == 0 else None
                axis.plot([place + shift] * len(errors), errors, "o", color=colour, alpha=0.6, label=label)
                axis.hlines(statistics.fmean(errors), place + shift - 0.12, place + shift + 0.12, color=colour, lw=2)
    _error_axis(axis, "start of sigmoid's bias (dot: seed, bar: mean)", by_batch=False)
    axis.set_xticks(range(len(BIAS_STYLES)), [name for name, _, _ in BIAS_STYLES])


def _error_axis(axis: Any, title: str, *, by_batch: bool = True) -> None:
    if by_batch:
        axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = (1, 2, 5, 10, 20, 50, 100)
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set(title=title, ylabel="zero-shot error, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left" if by_batch else "lower right")


def _plot_line(axis: Any, points: dict[int, list[float]], label: str, colour: str, style: str = "-") -> None:
    """A line of means with a band between low and high; ``points``: [mean, low, high] by x."""
    if points:
        mean, low, high = zip(*points.values(), strict=True)
        axis.plot(list(points), mean, style, marker="o", markersize=4, color=colour, label=label)
        axis.fill_between(list(points), low, high, color=colour, alpha=0.2, linewidth=0)
