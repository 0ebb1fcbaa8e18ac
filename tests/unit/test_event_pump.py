"""What a request to stop does to a training in each of its phases, as the driver sees it."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from raysft.errors import RunFailed, RunStopped
from raysft.stopping import StopRequest, stoppable
from raysft.storage.path import StoragePath
from raysft.telemetry.events import (
    GenerationNotice,
    SetupDone,
    TrainingEnded,
    TrainingStopped,
    WorkersResized,
    WorkersRestarting,
)
from raysft.train import event_pump
from raysft.train.checkpoint import parts
from raysft.train.checkpoint.catalog import folder_name
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot
from raysft.train.controller import ControllerStarted
from raysft.train.event_pump import EventPump, permanent_failures
from raysft.train.faults import BadImage
from raysft.train.generation_line import EngineAlive
from raysft.train.launch import _saved

SECONDS = 10
REQUEST = StopRequest("SIGTERM")
SET_UP = SetupDone(step=0, workers=1, model_seconds=0, data_wait_seconds=0, parameters=1, trained_parameters=1)


class Post:
    """A mailbox without Ray."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Any] = queue.Queue()
        self.asked: list[str] = []

    def put(self, message: Any, timeout: float) -> None:
        self.messages.put(message)

    def get(self, timeout: float) -> Any:
        return self.messages.get(timeout=timeout)

    def stop(self, reason: str) -> None:
        self.asked.append(reason)

    def close(self) -> None: ...


class Controller:
    """Counts how often the workers were ended."""

    actor: Any = None
    aborted = 0

    def abort(self) -> None:
        self.aborted += self.actor is not None


class Driver:
    """A pump between both."""

    def __init__(self, silent_minutes: float | None = None, generator: Any = None) -> None:
        self.post, self.controller, self.handled = Post(), Controller(), list[Any]()
        post: Any = self.post
        controller: Any = self.controller
        self.pump = EventPump(post, self.handled.append, controller, silent_minutes, generator)

    def hears(self, *messages: Any) -> None:
        """Let the pump take messages; return once it has."""
        for message in messages:
            self.post.put(message, 1)
        limit = time.monotonic() + SECONDS
        while not self.post.messages.empty():
            assert time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(0.05)  # the last one is being handled


@pytest.fixture
def driver() -> Iterator[Driver]:
    it = Driver()
    with it.pump:
        yield it


def test_workers_that_have_begun_are_asked_and_end_by_themselves(driver):
    driver.hears(ControllerStarted(object()), SET_UP)
    driver.pump.stop(REQUEST)
    assert driver.post.asked == ["SIGTERM"]
    assert driver.controller.aborted == 0
    driver.hears(TrainingStopped(7, "SIGTERM", {}))
    with pytest.raises(RunStopped, match=r"^stopped after step 7: SIGTERM$"):
        driver.pump.end()
    assert driver.pump.stopped_after == 7


@pytest.mark.parametrize(("error", "aborted"), [(BadImage("a.png: has changed"), 1), (RunFailed("no loss token"), 0)])
def test_an_error_that_one_worker_alone_has_ends_the_others(driver, error, aborted):
    """They would wait for it in a collective; other errors are raised by all of them."""
    driver.hears(ControllerStarted(object()), SET_UP)
    with permanent_failures(driver.post):
        raise error
    driver.hears()
    assert driver.controller.aborted == aborted
    with pytest.raises(RunFailed, match=str(error)):
        driver.pump.end()


def test_workers_that_cannot_go_on_as_they_were_asked_to_have_failed(driver):
    driver.hears(ControllerStarted(object()), SET_UP, TrainingStopped(7, "no such metric", {}, failed=True))
    with pytest.raises(RunFailed, match=r"^stopped after step 7: no such metric$"):
        driver.pump.end()


@pytest.mark.parametrize("started", [True, False])
def test_workers_that_have_not_begun_are_ended(driver, started):
    if started:
        driver.hears(ControllerStarted(object()))
    driver.pump.stop(REQUEST)
    driver.hears(*([] if started else [ControllerStarted(object())]))
    assert driver.controller.aborted == 1
    with pytest.raises(RunStopped, match=r"^stopped: SIGTERM$"):
        driver.pump.end()


def test_workers_that_fail_while_they_are_asked_are_not_started_again(driver):
    driver.hears(ControllerStarted(object()), SET_UP)
    driver.pump.stop(REQUEST)
    driver.hears(WorkersRestarting("worker 1 died"))
    assert driver.controller.aborted == 1
    with pytest.raises(RunStopped, match=r"^stopped: SIGTERM, and the workers failed \(worker 1 died\)$"):
        driver.pump.end()


@pytest.mark.parametrize("again", [WorkersRestarting("worker 1 died"), WorkersResized(1, 2)])
def test_workers_that_start_again_ask_for_their_predictions_again(again):
    class Forgetting:
        """What generates, as far as it is told of this."""

        forgot = 0

        def forget(self) -> None:
            self.forgot += 1

    generator = Forgetting()
    it = Driver(generator=generator)
    with it.pump:
        it.hears(ControllerStarted(object()), SET_UP, again)
    assert generator.forgot == 1
    assert it.handled[-1] == again


def test_the_silence_after_the_end_of_the_workers_loses_no_predictions(monkeypatch):
    monkeypatch.setattr(event_pump, "POLL_SECONDS", 0.05)
    it = Driver(silent_minutes=0.5 / 60)
    with it.pump:
        it.hears(ControllerStarted(object()), SET_UP, TrainingEnded({}, {}))
        assert it.pump.end() == TrainingEnded({}, {})
        time.sleep(1)
        late = GenerationNotice(7, "its predictions took hours")
        it.hears(late)
    assert it.pump.broken is None
    assert it.handled[-1] == late


def test_engines_at_work_do_not_hide_that_the_workers_are_lost(monkeypatch):
    monkeypatch.setattr(event_pump, "POLL_SECONDS", 0.05)
    it = Driver(silent_minutes=0.5 / 60)
    with it.pump:
        it.hears(ControllerStarted(object()), SET_UP)
        limit = time.monotonic() + SECONDS
        while it.pump.broken is None and time.monotonic() < limit:
            it.post.put(EngineAlive(1), 1)
            time.sleep(0.2)
    assert isinstance(it.pump.broken, RunFailed)
    assert "no heartbeat from the workers" in str(it.pump.broken)


@pytest.mark.parametrize(
    ("saved", "until", "line"),
    [
        ([4, 7], None, "; checkpoint written"),
        ([4, 7], 21.5, "; checkpoint written 21 s before the machine is taken away"),
        ([4], 21.5, "; the newest checkpoint is that of step 4"),
        ([], None, "; there is no checkpoint"),
    ],
)
def test_the_last_line_says_which_checkpoint_there_is(tmp_path, saved, until, line):
    checkpoints = StoragePath.of(tmp_path)
    for step in saved:
        parts.write(Snapshot(0, {}, {}, Cursor(step, 4 * step, 0, {})), checkpoints / folder_name(step, "a"))
    run: Any = SimpleNamespace(checkpoints=checkpoints)
    assert _saved(run, 7) == "", "nobody asked"
    with stoppable() as stopping:
        stopping.ask("SIGTERM", None if until is None else time.time() + until)
        assert _saved(run, 7) == line
