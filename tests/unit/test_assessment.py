"""What a training says and does once the model of a step is assessed."""

from types import SimpleNamespace
from typing import Any

import pytest

from raysft.config import TrainSection
from raysft.config.train import EarlyStopping
from raysft.telemetry.events import StoppedEarly
from raysft.train import assessment
from raysft.train.assessment import Assessment
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.early_stopping import EarlyStopper
from raysft.train.training import End

STEPS = 6


class Scores:
    """A generation after every second step, whose scores never get better."""

    def is_due(self, step: int) -> bool:
        return step % 2 == 0

    def __call__(self, *_: Any) -> dict[str, float]:
        return {"predict_chrf": 1.0}


@pytest.mark.parametrize(("patience", "stopped"), [(1, [4]), (2, [])])
def test_a_training_stops_early_only_where_steps_are_left(monkeypatch, patience, stopped):
    monkeypatch.setattr(assessment.dist, "get_rank", lambda: 1)
    train = TrainSection(early_stopping=EarlyStopping(patience=patience), best_metric="predict_chrf")
    events: list[Any] = []
    training: Any = SimpleNamespace(
        job=SimpleNamespace(config=SimpleNamespace(train=train)),
        row_plan=SimpleNamespace(steps=STEPS),
        engine=None,
        emit=events.append,
        end=End(),
    )
    stopper = EarlyStopper(train, keep=lambda: None)
    evaluator: Any = SimpleNamespace(seen=None)
    generations: Any = Scores()
    assessed = Assessment(training, evaluator, generations, stopper, {})
    for step in range(2, STEPS + 1, 2):
        assessed.generate(Cursor(step, 0, 0, {}))
        if stopper.should_stop:
            break
    assert [event.step for event in events if isinstance(event, StoppedEarly)] == stopped
    assert stopper.should_stop, "patience ends in each case, also with the last step"
