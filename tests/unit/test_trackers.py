"""Figures reach TensorBoard, and those that a killed run wrote after its checkpoint are hidden."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from raysft.trackers import missing_tracker, open_trackers
from tests.unit.test_log import set_up, step


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_steps_sources_and_evaluations(tmp_path):
    for begin, last in ((0, 4), (2, 3)):
        time.sleep(1.1)  # files of one second are not always read in their order
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
        tracker.on_setup(set_up(begin))
        for number in range(begin + 1, last + 1):
            tracker.on_step(replace(step(number, loss=float(number + begin)), source_losses={"a": 0.5}))
        tracker.on_evaluate({"current_steps": last, "eval_loss": 2.0, "eval_tokens": 9, "epoch": 1.0})
        tracker.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    assert found["eval/loss"] == [(3, 2.0)]
    assert found["train/source_loss/a"][0] == (1, 0.5)
    assert {"train/lr", "train/grad_norm", "train/throughput", "train/trained_throughput"} <= found.keys()
    assert "train/mfu" not in found
    assert "eval/tokens" not in found


def test_a_tracker_without_its_package_is_named(monkeypatch):
    assert missing_tracker(["tensorboard"]) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_tracker(["wandb"]) == "wandb"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_of_extras_are_known(name):
    with pytest.raises(RuntimeError, match=f"{name} cannot be opened .*No module named '{name}'"):
        open_trackers([name], None, {})  # type: ignore[arg-type]


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    said: list[str] = []
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, said.append)

    def fails(*_):
        raise OSError("the server is away\nand more")

    monkeypatch.setattr(tracker, "write", fails)
    tracker.on_step(step(1))
    tracker.on_step(step(2))
    assert said == ["tensorboard: takes no figures any more (the server is away); trainer_log.jsonl holds all"]
