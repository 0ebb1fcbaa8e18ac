"""What a sweep leaves that was asked to stop."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from raysft.config import Config, load, parse
from raysft.errors import RunStopped
from raysft.stopping import stoppable
from raysft.tune.record import Record, TrialRecord
from raysft.tune.running_sweep import Sweep
from raysft.tune.sources import FixedList
from raysft.tune.trials import combinations

RATES = [1e-5, 1e-4, 1e-3, 1e-2]


class Lines:
    """A terminal that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def config_of(folder: Path, **tune) -> Config:
    return parse(
        {
            "run": {"name": "s", "storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": [{"name": "a", "path": "a.jsonl"}], "holdout": 0.1},
            "tune": {"space": {"train.learning_rate": RATES}, **tune},
        }
    )


def sweep_with(config: Config, losses: list[float | None]) -> tuple[Sweep, Lines]:
    """A sweep whose trials are done with these losses; None: it was interrupted. Others have not begun."""
    trials, terminal = combinations(config), Lines()
    config.run_directory.mkdir(parents=True)
    (config.run_directory / "config.yaml").write_text(config.to_yaml())
    record = Record(config.run_directory / "trials.jsonl")
    for number, loss in enumerate(losses):
        trial = trials[number]
        begun = TrialRecord(trial.name, number, trial.configuration, trial.values, 0, started=10.0)
        record.append(begun)
        metrics = {"eval_loss": 3.0 if loss is None else loss}
        record.append(
            replace(begun, state="interrupted" if loss is None else "done", step=4, metrics=metrics, ended=20.0)
        )
        for part in ("model", "checkpoints"):
            (config.run_directory / "trials" / trial.name / part).mkdir(parents=True)
    return Sweep(config, FixedList(trials), record, len(trials), 1, None, terminal), terminal  # pyright: ignore


def test_a_sweep_that_is_asked_to_stop_ranks_the_trials_that_are_done(tmp_path):
    config = config_of(tmp_path, keep="best")
    sweep, terminal = sweep_with(config, [2.0, 1.5, None])
    with stoppable() as stopping:
        stopping.ask("SIGTERM")
        with pytest.raises(RunStopped, match=r"^stopped: SIGTERM; 2 of 4 trials have not ended$"):
            sweep.conclude({})
    run = config.run_directory
    ranked = json.loads((run / "tune_results.json").read_text())["trials"]
    assert [(trial["config"]["train.learning_rate"], trial["eval_loss"]) for trial in ranked] == [
        (1e-4, 1.5),
        (1e-5, 2.0),
    ]
    rows = list(csv.DictReader((run / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["done", "done", "interrupted"]
    assert load(run / "best.yaml").train.learning_rate == 1e-4
    assert "best eval_loss" in (run / "sweep.html").read_text()
    assert [line.split()[0] for line in terminal.lines] == ["eval_loss", "eval_loss", "best", "best", "page:"]
    left = {
        row["train.learning_rate"]: sorted(place.name for place in (run / "trials" / row["name"]).iterdir())
        for row in rows
    }
    assert left == {"1e-05": [], "0.0001": ["checkpoints", "model"], "0.001": ["checkpoints", "model"]}, (
        "a trial that goes on"
    )


def test_a_stopped_sweep_without_results_has_no_best_config(tmp_path):
    sweep, terminal = sweep_with(config_of(tmp_path), [math.nan, math.nan, math.nan, None])
    with pytest.raises(RunStopped, match=r"^stopped: 1 of 4 trials were asked to stop$"):
        sweep.conclude({})  # by a file in the trial's own run directory
    run = sweep.config.run_directory
    assert json.loads((run / "tune_results.json").read_text())["trials"] == []
    assert not (run / "best.yaml").exists()
    assert not terminal.lines
