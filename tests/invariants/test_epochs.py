"""A training of one and a half epochs: evaluated and saved by epoch, resumed anywhere, lengthened, and the same by its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysft.telemetry.events import EvaluationDone, StepRecord
from raysft.train.checkpoint.cursor import Cursor
from tests.training import Case, Result, make_config, prepare, rows_of, train_all

OF_EPOCH = 5
"""Steps of an epoch: 18 rows, 4 in a step."""
EVERY: dict[str, Any] = {
    "eval_every_epochs": 0.5,
    "save_every_epochs": 0.5,
    "save_every_steps": 7,
    "eval_at_start": False,
}


@dataclass(frozen=True)
class Trained:
    """The trainings, by name, and the checkpoints of the first one."""

    results: dict[str, Result]
    kept: Path

    def steps(self, name: str) -> list[StepRecord]:
        return [event for event in self.results[name].events if isinstance(event, StepRecord)]

    def evaluated(self, name: str) -> list[int]:
        events = self.results[name].events
        return [event.record["current_steps"] for event in events if isinstance(event, EvaluationDone)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder, model, manifest = prepare(tmp_path_factory.mktemp("epochs"))
    rows = replace(rows_of(manifest), epochs=1.5, max_steps=None)
    assert rows.row_plan.epoch_steps.tolist() == [OF_EPOCH, 2 * OF_EPOCH]

    def config(name: str, **train: Any) -> Any:
        return make_config(folder / name, model, **{**EVERY, "epochs": 1.5, "max_steps": None, **train})

    lasting = {"schedule": "constant"}
    two = replace(rows, epochs=2)
    cases = {
        "whole": Case(config("whole"), rows, keep=folder / "kept"),
        **{f"from {step}": Case(config(f"from-{step}"), rows, resume=folder / "kept" / f"checkpoint_{step}") for step in (3, 5, 7)},
        "by steps": Case(
            config("steps", epochs=1, max_steps=8, eval_delay=0.9), replace(rows, epochs=1, max_steps=8, repeat=True)
        ),
        "constant": Case(config("constant", **lasting), rows, keep=folder / "constant-kept"),
        "two": Case(config("two", **lasting, epochs=2), two),
        "then two": Case(config("then", **lasting, epochs=2), two, resume=folder / "constant-kept" / "checkpoint_7"),
    }  # fmt: skip
    results = dict(zip(cases, train_all(list(cases.values())), strict=True))
    assert not any(result.failure for result in results.values()), [result.failure for result in results.values()]
    return Trained(results, folder / "kept")


def test_half_an_epoch_is_half_of_its_steps_rounded_up(trained):
    steps = trained.steps("whole")
    assert [step.total_steps for step in steps] == [8] * 8
    assert [step.rows for step in steps] == [4, 8, 12, 16, 18, 22, 26, 30]
    assert [step.epoch for step in steps] == [
        round(each, 4) for each in (4 / 18, 8 / 18, 12 / 18, 16 / 18, 1, 22 / 18, 26 / 18, 30 / 18)
    ]
    assert [step.lr for step in steps] == pytest.approx(
        [1e-2 * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)]
    )


def test_evaluations_and_checkpoints_come_after_each_half_of_an_epoch(trained):
    assert trained.evaluated("whole") == [3, 5, 8]
    assert trained.evaluated("by steps") == [5, 8], "a delay leaves the evaluation at the end alone"
    saved = {cursor.step: cursor for cursor in map(Cursor.read, trained.kept.iterdir())}
    assert sorted(saved) == [3, 5, 7, 8]
    assert not any(cursor.temporary for cursor in saved.values())


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_training_that_resumes_within_an_epoch_equals_one_that_was_not_interrupted(trained, step):
    whole, resumed = trained.results["whole"], trained.results[f"from {step}"]
    assert (resumed.losses, resumed.norms) == (whole.losses[step:], whole.norms[step:])
    assert trained.evaluated(f"from {step}") == [each for each in (3, 5, 8) if each > step]
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(resumed.weights[name], value, err_msg=name)


def test_as_many_steps_train_the_same_as_the_epochs(trained):
    whole, by_steps = trained.results["whole"], trained.results["by steps"]
    assert by_steps.losses == whole.losses
    for name, value in whole.weights.items():
        np.testing.assert_array_equal(by_steps.weights[name], value, err_msg=name)


def test_a_training_that_is_lengthened_within_an_epoch_completes_it(trained):
    two, lengthened = trained.results["two"], trained.results["then two"]
    assert trained.results["constant"].losses == two.losses[:8]
    assert lengthened.losses == two.losses[7:]
    assert [step.rows for step in trained.steps("then two")] == [30, 34, 36]
    for name, value in two.weights.items():
        np.testing.assert_array_equal(lengthened.weights[name], value, err_msg=name)
