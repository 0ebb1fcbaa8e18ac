"""Metrics reach the trackers, and a tracker that fails does not disturb the training."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from dataclasses import asdict, replace

import pytest

from raysft.telemetry import trackers
from raysft.telemetry.trackers import missing_tracker, open_trackers
from tests.servers import http, serving, silent
from tests.unit.test_train_log import set_up, step


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_steps_sources_and_evaluations(tmp_path):
    for begin, last in ((0, 4), (2, 3)):
        time.sleep(1.1)  # files of one second are not always read in their order
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
        tracker.on_setup(asdict(set_up(begin)))
        for number in range(begin + 1, last + 1):
            tracker.on_step(replace(step(number, loss=float(number + begin)), source_losses={"a": 0.5}))
        tracker.on_evaluate({"current_steps": last, "eval_loss": 2.0, "eval_tokens": 9, "epoch": 1.0})
        tracker.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    assert found["eval/loss"] == [(3, 2.0)]
    assert found["train/source_loss/a"][0] == (1, 0.5)
    assert {"train/lr", "train/grad_norm", "train/throughput", "train/loss_token_throughput"} <= found.keys()
    assert "train/mfu" not in found
    assert "eval/tokens" not in found


def test_a_tracker_without_its_package_is_named(monkeypatch):
    assert missing_tracker(["tensorboard"]) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_tracker(["wandb"]) == "wandb"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_trackers_of_extras_are_known(name):
    with pytest.raises(RuntimeError, match=f"cannot open {name} .*No module named '{name}'"):
        open_trackers([name], None, {})  # type: ignore[arg-type]


class Posting(trackers._Writer):
    """Sends metrics to a server without a time limit, as some tracker libraries do."""

    port = 0

    def __init__(self, run, config) -> None:
        if config.get("greets"):
            self.write(0, {})

    def write(self, step, metrics) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", json.dumps(metrics).encode()) as answer:
            json.load(answer)


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(trackers, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setitem(trackers.WRITERS, "wandb", Posting)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (silent, "no answer for 0.5 s"),
        (http("500 Internal Server Error"), "HTTP Error 500: Internal Server Error"),
        (http("403 Forbidden"), "HTTP Error 403: Forbidden"),
        (http("200 OK", b"<html>"), "Expecting value: line 1 column 1 (char 0)"),
        (http("200 OK", b"{", length=99), "IncompleteRead(1 bytes read, 98 more expected)"),
    ],
    ids=["silent", "fails", "forbids", "a page", "half an answer"],
)
@pytest.mark.usefixtures("hurried")
def test_a_server_that_fails_neither_ends_nor_holds_up_the_training(tmp_path, monkeypatch, answer, reason):
    lines: list[str] = []
    with serving(answer) as Posting.port:
        with pytest.raises(RuntimeError, match=re.escape(f"cannot open wandb ({reason})")):
            open_trackers(["wandb"], tmp_path, {"greets": True}, lines.append)
        (tracker,) = open_trackers(["wandb"], tmp_path, {}, lines.append)
        started = time.monotonic()
        tracker.on_setup(asdict(set_up(0)))
        for number in range(1, 100):
            tracker.on_step(step(number))
        assert time.monotonic() - started < 0.4
        tracker.close()
        assert time.monotonic() - started < 2
    assert lines == [f"wandb: disabled ({reason}); trainer_log.jsonl has all metrics"]


@pytest.mark.usefixtures("hurried")
def test_metrics_that_no_server_takes_do_not_fill_the_memory(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(trackers, "MAX_QUEUED", 10)
    with serving(silent) as Posting.port:
        (tracker,) = open_trackers(["wandb"], tmp_path, {}, lines.append)
        for number in range(1, 100):
            tracker.on_step(step(number))
    assert lines == ["wandb: disabled (10 writes are waiting); trainer_log.jsonl has all metrics"]
