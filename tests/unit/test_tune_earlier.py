"""What a sweep that is started again keeps of trials that go on."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from raysft.config import parse, with_overrides
from raysft.run.preflight import check_trials
from raysft.telemetry.terminal import Terminal
from raysft.tune.population import members
from raysft.tune.progress import Recorder
from raysft.tune.ranking import Objectives
from raysft.tune.record import Record, State, TrialRecord
from raysft.tune.search import Search
from raysft.tune.sources import FixedList
from raysft.tune.trials import combinations
from tests.messages import refusal

CONFIG = parse(
    {
        "model": {"path": "m"},
        "data": {"train": [{"name": "a", "path": "a.jsonl"}]},
        "tune": {"space": {"train.learning_rate": [1e-3, 1e-4, 1e-5]}, "scheduler": "pbt"},
    }
)


def started(record: Record, name: str, number: int) -> TrialRecord:
    """Record the start of a trial, and return what the record says of it then."""
    given = {
        "trial": name,
        "number": number,
        "configuration": name,
        "values": "{}",
        "config": json.dumps({"run": {"seed": 0}}),
    }
    trial: Any = SimpleNamespace(config=given)
    Recorder(Objectives.of(CONFIG.tune), record).on_trial_start(0, [], trial)
    return record.read()[name]


def test_a_trial_that_goes_on_keeps_its_results_until_there_are_others(tmp_path):
    record = Record(tmp_path / "trials.jsonl")
    parent = {"trial": "done", "step": 40}
    states: dict[str, State] = {"cut": "interrupted", "done": "done", "failed": "failed"}
    for number, (name, state) in enumerate(states.items()):
        record.append(TrialRecord(name, number, name, {}, 0, state, 80, {"eval_loss": 1.5}, "why", 7.0, 9.0, parent))
    for number, name in ((0, "cut"), (2, "failed")):
        kept = started(record, name, number)
        assert (kept.state, kept.step, kept.metrics, kept.parent) == ("running", 80, {"eval_loss": 1.5}, parent)
        assert (kept.reason, kept.ended) == ("", None)
        assert kept.started > 9
    # One that had ended starts again if its results do not count any more, and one that is new has none.
    for number, name in ((1, "done"), (3, "new")):
        fresh = started(record, name, number)
        assert (fresh.step, fresh.metrics, fresh.parent) == (None, {}, None)


def test_of_a_population_that_goes_on_the_trial_that_is_furthest_behind_is_first():
    first, second, third = combinations(CONFIG)
    recorded = {
        trial.name: TrialRecord(trial.name, number, trial.name, trial.values, 0, "interrupted", step)
        for number, (trial, step) in enumerate(((first, 160), (second, None)))
    }
    search = Search(CONFIG, FixedList([first, second, third]), recorded, lambda config: config)
    assert list(members(search, recorded)) == [second.name, third.name, first.name]


def test_a_population_goes_on_though_its_values_have_changed(tmp_path):
    given = with_overrides(CONFIG, {"run.storage": str(tmp_path), "data.cache": str(tmp_path)})
    trial = combinations(given)[0].config
    trial.run_directory.mkdir(parents=True)
    (trial.run_directory / "trainer_log.jsonl").touch()

    def ran_with(**changed: float) -> None:
        had = with_overrides(trial, {f"train.{key}": value for key, value in changed.items()})
        (trial.run_directory / "config.yaml").write_text(had.to_yaml())

    ran_with(learning_rate=5e-4)
    check_trials([trial], Terminal(), list(given.tune.space))
    assert "train.learning_rate=0.001 (the run has 0.0005)" in refusal(lambda: check_trials([trial], Terminal()))
    ran_with(learning_rate=5e-4, weight_decay=0.5)
    message = refusal(lambda: check_trials([trial], Terminal(), list(given.tune.space)))
    assert "train.weight_decay=0.0 (the run has 0.5)" in message
