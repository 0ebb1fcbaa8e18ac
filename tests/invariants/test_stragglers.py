"""A worker that keeps the others waiting is named, with the cause; where all are alike, nobody is."""

from __future__ import annotations

import pytest

from raysft.data.rows.packed_dataset import PackedDataset
from raysft.telemetry.events import StepRecord, WorkerSlow
from tests.tiny_vision import tiny_processor, tiny_vision_model
from tests.training import Case, Result, make_config, prepare, rows_of, train_all
from tests.vision_shards import draw, questions, written_with_images

SECONDS = 0.2
PIXEL_SECONDS = 2.0
"""Much more than a step takes that no pixels hold up, also on a machine that has other work."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Result]:
    """Three trainings of two workers, with ZeRO-2, 2 and 3."""
    folder, model, manifest = prepare(tmp_path_factory.mktemp("stragglers"))
    cases = [
        Case(make_config(folder, model, {"train.zero_stage": stage}), rows_of(manifest), slow=slow)
        for stage, slow in ((2, ("forward", SECONDS)), (2, ("data", SECONDS)), (3, ("forward", SECONDS)))
    ]
    return train_all(cases, 2)


@pytest.fixture(scope="module")
def named(trained) -> list[list[WorkerSlow]]:
    """Who was called slow in each."""
    return [[event for event in result.events if isinstance(event, WorkerSlow)] for result in trained]


def test_a_slow_forward_pass_is_named_once(named):
    (slow,) = named[0]
    assert (slow.step, slow.rank) == (2, 1)
    assert slow.factor > 1.2
    assert slow.cause.startswith("forward pass 0.")


def test_waiting_for_rows_is_named(named):
    (slow,) = named[1]
    assert slow.rank == 1
    assert slow.cause.startswith("waits 0.")


def test_the_log_has_the_time_that_a_training_waits_for_the_rows_of_another_worker(trained):
    steps = [event for event in trained[1].events if isinstance(event, StepRecord)][1:]
    assert sum(step.step_seconds + step.data_wait_seconds for step in steps) > 0.75 * SECONDS * len(steps)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[StepRecord]:
    """What the first of two workers logs while the second one makes its pixels slowly."""
    folder = tmp_path_factory.mktemp("pixels")
    model, processor = tiny_vision_model(folder / "model", "llava"), tiny_processor("llava")
    manifest = written_with_images(folder / "set", processor, questions(draw(folder / "images", 14)))
    rows = PackedDataset((manifest.path.location,), 64, 4, epochs=9, max_steps=7)
    config = make_config(folder, model, {"data.sequence_length": 64, "train.zero_stage": 2}, max_steps=7)
    (result,) = train_all([Case(config, rows, slow=("pixels", PIXEL_SECONDS))], 2)
    assert not result.failure
    return [event for event in result.events if isinstance(event, StepRecord)]


def test_the_log_has_the_time_that_a_training_waits_for_the_pixels_of_another_worker(shown):
    """Of which a few are made at the same time, so that about every other step has to wait."""
    assert len(shown) == 7
    assert sum(step.data_wait_seconds for step in shown) > PIXEL_SECONDS
    assert max(step.step_seconds for step in shown) < PIXEL_SECONDS


def test_with_zero_3_a_forward_pass_waits_for_the_others_and_tells_nothing(named):
    assert named[2] == []
