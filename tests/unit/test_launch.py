"""Where the workers of a training resume."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError

from raysft.errors import RunFailed
from raysft.storage import retry
from raysft.storage.path import StoragePath
from raysft.telemetry.events import Waiting
from raysft.train import launch
from raysft.train.checkpoint import parts
from raysft.train.checkpoint.catalog import folder_name
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.dataset_config import RESUME, TRAIN, PlannedDataConfig, Resumption
from tests.messages import holds


@pytest.fixture
def checkpoints(tmp_path) -> StoragePath:
    return StoragePath.of(tmp_path / "checkpoints")


def save(checkpoints: StoragePath, step: int) -> StoragePath:
    folder = checkpoints / folder_name(step, "a")
    parts.write(Snapshot(0, {}, {}, Cursor(step, 4 * step, 0, {})), folder)
    return folder


def started(resumption: Resumption) -> tuple[ResumePoint | None, ResumePoint | None]:
    """What the workers and the data resume from, as Ray Train's controller asks for it."""
    datasets = cloudpickle.loads(cloudpickle.dumps(resumption.datasets()))
    return tuple(function() for function in datasets.values())  # type: ignore[return-value]


def test_the_data_begins_where_the_workers_resume_whatever_is_written_meanwhile(checkpoints):
    datasets = Resumption(checkpoints, print).datasets()
    assert list(datasets) == [RESUME, TRAIN]
    first = save(checkpoints, 2)
    resume = datasets[RESUME]()
    second = save(checkpoints, 4)
    assert resume == datasets[TRAIN]() == ResumePoint.of(first)
    assert datasets[RESUME]() == datasets[TRAIN]() == ResumePoint.of(second), (
        "another start of the workers decides anew"
    )


def test_a_decision_is_shared_in_the_controller_too(checkpoints):
    assert started(Resumption(checkpoints, print)) == (None, None)
    save(checkpoints, 2)
    resume, train = started(Resumption(checkpoints, print))
    assert resume is train is not None


def test_storage_that_is_away_is_waited_for_and_not_taken_for_no_checkpoint(checkpoints, monkeypatch):
    expected, answers = ResumePoint.of(save(checkpoints, 2)), iter([OSError("connection refused")])

    def walk(self: StoragePath) -> Any:
        return retry.retry(fail_once, "s3://bucket") or original(self)

    def fail_once() -> None:
        for error in answers:
            raise error

    original = StoragePath.walk
    monkeypatch.setattr(StoragePath, "walk", walk)
    events: list[Any] = []
    assert Resumption(checkpoints, events.append).datasets()[RESUME]() == expected
    assert [type(event) for event in events] == [Waiting]
    assert "s3://bucket: waiting for the storage" in events[0].message


@pytest.mark.parametrize(("label", "selector"), [(None, None), ("role=data", {"role": "data"})])
def test_workers_get_the_resume_point_and_rows_from_its_step_on(monkeypatch, label, selector):
    """Up to 64 from one pipeline, more from readers on their nodes; with a label both run on the nodes for data."""
    asked: list[Any] = []
    options = SimpleNamespace()
    rows = SimpleNamespace(
        dataset=lambda first, workers, group: asked.append((first, workers)) or "dataset",
        node_shards=lambda first, nodes, label, group: asked.append((first, len(nodes), label)) or list(nodes),
        execution_options=lambda workers, group: options,
    )
    monkeypatch.setattr(
        ray.train.DataConfig, "configure", lambda self, made, workers, *rest, **options: [made] * workers
    )
    settings = SimpleNamespace(scaling=SimpleNamespace(data_label=label, sequence_parallel=1))
    config: Any = PlannedDataConfig(SimpleNamespace(config=settings, train_rows=rows))  # type: ignore[arg-type]
    resume, nodes = ResumePoint(StoragePath.of("/c"), Cursor(3, 12, 0, {})), [f"node {n}" for n in range(65)]
    assert config.configure({RESUME: resume}, 2, None, nodes[:2]) == [{RESUME: resume}] * 2
    assert config.configure({TRAIN: resume}, 2, None, nodes[:2]) == [{TRAIN: "dataset"}] * 2
    assert options.label_selector == selector
    config.configure({TRAIN: None}, 64, None, nodes[:64])
    assert config.configure({TRAIN: resume}, 65, None, nodes) == [{TRAIN: node} for node in nodes]
    assert asked == [(3, 2), (0, 64), (3, 65, label)]


def job_of(workers: int, steps: int) -> Any:
    config = SimpleNamespace(train=SimpleNamespace(hang_minutes=15), scaling=SimpleNamespace(most_workers=workers))
    return SimpleNamespace(config=config, steps=steps)


def test_a_cluster_that_is_lost_ends_the_training_in_one_line(monkeypatch):
    class Pump(nullcontext):
        broken = None

        def stop(self, request: Any) -> None: ...

    def fit() -> None:
        raise ActorUnavailableError("The actor is unavailable:\nRpcError: Connection refused", None)

    trainer: Any = SimpleNamespace(fit=fit, stop=lambda: None)
    monkeypatch.setattr(launch, "Mailbox", lambda: None)
    monkeypatch.setattr(launch, "EventPump", lambda *arguments: Pump(Pump()))
    job = job_of(workers=2, steps=10)
    monkeypatch.setattr(launch, "_trainer", lambda *arguments: trainer)
    with pytest.raises(RunFailed) as failed:
        launch.evaluate(job, lambda event: None)
    assert holds(str(failed.value), "the evaluation failed … The actor is unavailable … run it again")
    assert "\n" not in str(failed.value)


def test_the_controller_of_a_short_training_with_one_worker_notices_its_end_sooner(monkeypatch):
    def settings(workers: int, steps: int) -> dict[str, str]:
        return launch._controller_settings(job_of(workers, steps))

    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    monkeypatch.delenv(name, raising=False)
    assert float(settings(1, 10)[name]) < 1
    assert name not in settings(2, 10)
    assert name not in settings(1, 100_000)
    monkeypatch.setenv(name, "7")
    assert settings(1, 10)[name] == "7", "what the user has set"
