"""``python -m bench study``: the experiment of ``study.py``, and what came out as JSON, Markdown and a plot.

All are written anew after each run; the same command goes on where an interrupted one has stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from bench import report, study
from bench.progress import Progress
from bench.study import Design, Outcome, Run


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
            about = report.environment(torch.device("cpu")) | {"scikit-learn": version("scikit-learn")}
            return cls(design, about, [])
        saved = json.loads(path.read_text())
        found = Design(**{key: tuple(v) if isinstance(v, list) else v for key, v in saved["design"].items()})
        if found != design:
            raise ValueError(f"{path} must be of the same design, {design}, got {found}")
        return cls(design, saved["about"], [study.from_json(outcome) for outcome in saved["outcomes"]])

    def perform(self, runs: Sequence[Run], folder: Path) -> None:
        """Those of ``runs`` that are missing."""
        done = {outcome.run for outcome in self.outcomes}
        missing = [run for run in runs if run not in done]
        progress = Progress(len(missing))
        for run in missing:
            name = f"{run.loss} by {run.labels}, batch {run.batch}, b {run.bias}, lr {run.lr:g}, seed {run.seed}"
            progress.show(name)
            self.outcomes.append(study.perform(run, self.design))
            self.write(folder)
            progress.finish(f"{name}: {self.outcomes[-1].mean_accuracy:.1%}")

    def write(self, folder: Path) -> list[Path]:
        """study.json"""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "study.json"
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"
        # An interruption while writing leaves the old file.
        path.with_suffix(".part").write_text(text)
        path.with_suffix(".part").replace(path)
        return [path]


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
    results = Study.resume(design, options.out)
    results.perform(design.search(), options.out)
    rates = study.choose(results.outcomes, design)
    results.perform([run for seed in range(options.seeds) for run in design.runs(seed, rates)], options.out)
    print("written: " + ", ".join(map(str, results.write(options.out))))
    return 0
