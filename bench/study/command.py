"""``python -m bench study``: runs the experiment of ``experiment.py``, and writes study.json, study.md and study.png.

Run again, it continues an interrupted experiment, and adds seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.study import experiment, plot
from bench.study.experiment import Design, Study
from bench.study.report import markdown


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
    design = experiment.QUICK if options.quick else Design()
    try:
        results = Study.resume(design, options.out)
    except ValueError as error:
        print(f"--out: {error}")
        return 1
    results.run_missing(design.search(), options.out)
    rates = experiment.choose_learning_rates(results.outcomes, design)
    results.run_missing([run for seed in range(options.seeds) for run in design.runs(seed, rates)], options.out)
    paths = [results.write(options.out), options.out / "study.md"]
    paths[1].write_text(text := markdown(results))
    paths += plot.plot(results, options.out)
    print(text)
    print("written: " + ", ".join(map(str, paths)))
    return 0
