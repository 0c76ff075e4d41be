"""The study of sigmoid against softmax: its plan is fair, its statistics are right, its runs repeat and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from bench.__main__ import main
from bench.study import experiment
from bench.study.experiment import LABELS, LOSSES, Design, Outcome, Run, Study
from bench.study.report import markdown
from bench.study.statistics import OutcomesBySeed, better_loss, spread

DESIGN = Design(256, (16, 32), (32,), (32, 16), (1e-3, 1e-2), image_width=4, text_width=8)
RATES = {(loss, labels, batch): 3e-3 for loss in LOSSES for labels in LABELS for batch in (16, 32)}
RUN = Run("sigmoid", "pair", 32, 256, -10.0, 3e-3, seed=0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def made_up(run: Run, accuracy: float) -> Outcome:
    return Outcome(
        run, dict.fromkeys(experiment.digits_example().LANGUAGES, accuracy), {1: 9.0, 2: 8.0}, 10.0, run.bias, 1.0
    )


def test_it_writes_its_files_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "study.md").read_text() in printed
    assert all(language in printed for language in ("English", "Korean", "German", "Japanese"))
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["about"]["torch"] == torch.__version__
    search = len(experiment.QUICK.search())
    assert [outcome["run"]["validation"] for outcome in saved["outcomes"]][: search + 1] == [True] * search + [False]

    # As if interrupted before the last three runs.
    kept = saved["outcomes"][:-3]
    (tmp_path / "study.json").write_text(json.dumps(saved | {"outcomes": kept}))
    results = Study.resume(experiment.QUICK, tmp_path)
    results.run_missing(
        experiment.QUICK.runs(0, experiment.choose_learning_rates(results.outcomes, experiment.QUICK)), tmp_path
    )
    again = json.loads((tmp_path / "study.json").read_text())["outcomes"]
    assert again[:-3] == kept
    assert [o | {"seconds": 0} for o in again] == [o | {"seconds": 0} for o in saved["outcomes"]]


def test_another_design_is_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Study(DESIGN, {}, []).write(tmp_path)
    assert main(["study", "--quick", "--out", str(tmp_path)]) == 1
    assert "must be of the same design" in capsys.readouterr().out


def test_same_seed_same_numbers() -> None:
    torch.set_num_threads(1)
    first, again, other = (experiment.train(replace(RUN, seed=seed), DESIGN) for seed in (0, 0, 1))
    assert first.curve == again.curve
    assert first.accuracy == again.accuracy
    assert first.curve != other.curve
    assert sorted(first.curve) == [1, 2, 4, 8]


def test_both_losses_see_the_same_examples_from_the_same_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    script, seen = experiment.digits_example(), []

    def watched(name: str, model: Any, batches: Any, steps: int, lr: float) -> list[float]:
        weights = [p.detach().clone() for tower in (model.image_tower, model.text_tower) for p in tower.parameters()]
        seen.append((weights, list(batches)))
        return [0.0] * steps

    monkeypatch.setattr(script, "train", watched)
    for batch in DESIGN.batches:
        for labels in LABELS:
            for loss in LOSSES:
                experiment.train(Run(loss, labels, batch, DESIGN.examples, -10.0, 1e-3, seed=3), DESIGN)
            (towers, batches), (other_towers, other_batches) = seen[-2:]
            assert sum(len(b.images) for b in batches) == DESIGN.examples
            assert all(torch.equal(p, q) for p, q in zip(towers, other_towers, strict=True))
            for b, other in zip(batches, other_batches, strict=True):
                assert all(torch.equal(t, u) for t, u in zip(b, other, strict=True))
                by_pair = torch.equal(b.labels, torch.arange(batch))
                assert by_pair == (labels == "pair")


def test_the_learning_rate_is_chosen_without_the_test_images() -> None:
    data, validation = experiment.load_digits(False), experiment.load_digits(True)
    rows = {
        name: {tuple(image.flatten().tolist()) for image in getattr(d, f"{part}_images")}
        for name, d, part in (
            ("train", data, "train"),
            ("test", data, "test"),
            ("fitted", validation, "train"),
            ("held", validation, "test"),
        )
    }
    assert rows["fitted"] | rows["held"] == rows["train"]
    assert not rows["fitted"] & rows["held"]
    assert not (rows["fitted"] | rows["held"]) & rows["test"]
    assert all(run.validation and run.seed in experiment.SEARCH_SEEDS for run in DESIGN.search())
    assert not any(run.validation for run in DESIGN.runs(0, RATES))


def test_plan() -> None:
    runs = DESIGN.runs(0, RATES)
    assert len(runs) == len(set(runs)) == 2 * 2 * 2 + 2 * 3 + 2 * 2
    stretched = [run for run in runs if run.examples != DESIGN.examples]
    assert {(run.loss, run.labels) for run in stretched} == {(loss, labels) for loss in LOSSES for labels in LABELS}
    assert {(run.batch, run.examples // run.batch) for run in stretched} == {(32, 256 // 16)}
    for labels in LABELS:
        mine = [run for run in runs if run.labels == labels and run not in stretched]
        assert {(run.loss, run.batch) for run in mine} == {(loss, batch) for loss in LOSSES for batch in (16, 32)}
        starts = [run.bias for run in mine if run.loss == "sigmoid" and run.batch == 32]
        assert sorted(starts, key=str) == sorted([-10.0, experiment.log_odds(labels, 32), 0.0, None], key=str)
    # One positive in 32 texts, and one in ten.
    assert 1 / (1 + math.exp(-experiment.log_odds("pair", 32))) == pytest.approx(1 / 32)
    assert 1 / (1 + math.exp(-experiment.log_odds("class", 32))) == pytest.approx(1 / 10)
    with pytest.raises(ValueError, match="multiple of every batch, got 256 and 48"):
        replace(DESIGN, batches=(32, 48))
    with pytest.raises(ValueError, match="bias_batches must be among"):
        replace(DESIGN, bias_batches=(64,))
    with pytest.raises(ValueError, match="stretched must be among"):
        replace(DESIGN, stretched=(64, 16))


def test_choice_of_learning_rates() -> None:
    read = {1e-3: 0.8, 1e-2: 0.9}
    outcomes = [made_up(run, read[run.lr]) for run in DESIGN.search()]
    outcomes[0] = made_up(outcomes[0].run, 0.99)  # one seed alone: the mean of three is still less
    outcomes.append(made_up(replace(RUN, lr=1.0), 1.0))  # on test images: no reason to choose it
    rates = experiment.choose_learning_rates(outcomes, DESIGN)
    assert rates.keys() == RATES.keys()
    assert {rates[cell] for cell in rates if cell[2] == 32} == {1e-2}
    assert {rates[cell] for cell in rates if cell[2] == 16} == {1e-2 * math.sqrt(0.5)}
    equals = experiment.choose_learning_rates([made_up(run, 0.5) for run in DESIGN.search()][::-1], DESIGN)
    assert {equals[cell] for cell in equals if cell[2] == 32} == {1e-3}


def test_spread_on_made_up_figures() -> None:
    of_three = spread([0.90, 0.92, 0.97])
    assert of_three[:4] == pytest.approx((0.93, math.sqrt(0.0013), 0.90, 0.97))
    # Student's quantile for two degrees of freedom is 4.3027.
    assert of_three.half_width == pytest.approx(4.3027 * math.sqrt(0.0013 / 3), rel=1e-4)
    assert str(of_three) == "93.0 ± 3.6"
    alone = spread([0.5])
    assert alone.mean == 0.5
    assert str(alone) == "50.0"
    assert math.isnan(alone.sd)
    assert math.isnan(alone.half_width)


def test_differences_are_taken_seed_by_seed() -> None:
    """OutcomesBySeed that differ by far more than the losses do; one seed has one loss only."""
    outcomes = []
    for seed, (sigmoid, softmax) in enumerate([(0.60, 0.58), (0.80, 0.77), (0.90, 0.86)]):
        outcomes.append(made_up(replace(RUN, seed=seed), sigmoid))
        outcomes.append(made_up(replace(RUN, seed=seed, loss="softmax", bias=None), softmax))
    outcomes.append(made_up(replace(RUN, seed=3), 0.1))
    outcomes.append(made_up(replace(RUN, seed=0, bias=0.0), 0.2))
    outcomes.append(made_up(replace(RUN, seed=0, validation=True), 0.3))
    results = Study(DESIGN, {"torch": "2"}, outcomes)
    difference = OutcomesBySeed(results).difference("pair", 32)
    assert difference is not None
    assert difference[:4] == pytest.approx((0.03, 0.01, 0.02, 0.04))
    assert better_loss(difference) == "sigmoid"
    assert better_loss(spread([-0.02, -0.03, -0.04])) == "softmax"
    assert better_loss(spread([0.02, -0.01, 0.03])) == "within the spread"
    assert better_loss(spread([0.5])) == "one seed"
    assert OutcomesBySeed(results).shared_settings() == [("pair", 32, 256)]
    line = next(line for line in markdown(results).splitlines() if line.startswith("| pair   | 32"))
    assert "+3.0 ± 2.5" in line
    assert "| sigmoid " in line


def test_equal_captions_are_read_once_and_give_the_same_features() -> None:
    tower, data = experiment.ByteTower(8), experiment.load_digits(False)
    batch = next(data.batches(1, 300, 0))
    alone = torch.cat([tower(row[None]) for row in batch.tokens[:20]])
    torch.testing.assert_close(tower(batch.tokens)[:20], alone)
    assert torch.unique(tower(data.tokens.flatten(0, 2)), dim=0).shape[0] == 160
