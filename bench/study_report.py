"""``python -m bench study``: runs the experiment of ``study.py``, and writes study.json, study.md and study.png.

The same command goes on where an interrupted one has stopped, and adds seeds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import report, study, study_plot
from bench.study import LOSSES, Design, Outcome, Study
from bench.study_statistics import Seeds, accuracy, verdict


def markdown(results: Study) -> str:
    """Everything; the same text serves the terminal."""
    design, seeds = results.design, Seeds(results)
    numbers = ", ".join(map(str, sorted({seed for outcomes in seeds.by_start.values() for seed in outcomes})))
    sections = [
        "# Sigmoid against softmax on handwritten digits",
        ", ".join(f"{key} {value}" for key, value in results.about.items() if value),
        f"{design.examples:,} examples a run whatever the batch, apart from {design.stretched[0]:,} × "
        f"{design.stretched_examples // design.stretched[0]:,} steps; seeds {numbers or 'none yet'}; "
        f"accuracy in % of {len(study.digits(False).test_labels)} held-out images, mean ± standard deviation over the "
        "seeds; differences, taken seed by seed, with the 95 % interval of their mean.",
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


def comparison(seeds: Seeds) -> str:
    lines = []
    for labels, batch, examples in seeds.cells():
        both = [seeds.of(loss, labels, batch, examples).values() for loss in LOSSES]
        difference = seeds.difference(labels, batch, examples)
        assert difference is not None
        rates = [f"{next(iter(outcomes)).run.lr:.2g}" for outcomes in both]
        shown = f"{100 * difference.mean:+.1f} ± {100 * difference.half_width:.1f}".removesuffix(" ± nan")
        steps = f"{examples // batch:,}"
        accuracies = [str(accuracy(outcomes)) for outcomes in both]
        lines.append([labels, f"{batch:,}", steps, *rates, *accuracies, shown, verdict(difference)])
    head = ["labels", "batch", "steps", *(f"lr, {loss}" for loss in LOSSES), *LOSSES, "sigmoid − softmax", "reads more"]
    return report.grid(head, lines)


def languages(seeds: Seeds) -> str:
    names = list(study.example().LANGUAGES)
    lines = []
    for labels, batch, examples in seeds.cells():
        both = [seeds.of(loss, labels, batch, examples).values() for loss in LOSSES]
        cells = [" / ".join(str(accuracy(outcomes, name)) for outcomes in both) for name in names]
        lines.append([labels, f"{batch:,}", f"{examples // batch:,}", *cells])
    return report.grid(["labels", "batch", "steps", *names], lines)


def biases(seeds: Seeds) -> str:
    lines = []
    for labels, batch, bias, found in seeds.of_biases():
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
    return report.grid(["labels", "batch", "b", "first loss", "last loss", "t, end", "b, end", "accuracy"], lines)


def bias_name(bias: float | None) -> str:
    return "none" if bias is None else f"{bias:.3g}".replace("-", "−")


def learning_rates(results: Study) -> str:
    lines = []
    for (loss, labels, batch), by_rate in study.validated(results.outcomes).items():
        read = [f"{100 * by_rate[lr]:.1f}" if lr in by_rate else "" for lr in results.design.rates]
        lines.append([labels, f"{batch:,}", loss, *read])
    return report.grid(["labels", "batch", "loss", *(f"{lr:g}" for lr in results.design.rates)], lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny experiment, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    design = study.QUICK if options.quick else Design()
    try:
        results = Study.resume(design, options.out)
    except ValueError as error:
        print(f"--out: {error}")
        return 1
    results.perform(design.search(), options.out)
    rates = study.choose(results.outcomes, design)
    results.perform([run for seed in range(options.seeds) for run in design.runs(seed, rates)], options.out)
    paths = [results.write(options.out), options.out / "study.md"]
    paths[1].write_text(text := markdown(results))
    paths += study_plot.plot(results, options.out)
    print(text)
    print("written: " + ", ".join(map(str, paths)))
    return 0
