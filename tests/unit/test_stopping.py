"""What asks a run to stop, who hears of it, and what is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import ray

from raysft.cluster import ray_internals
from raysft.errors import RequestError, RunStopped
from raysft.run import stop_sources
from raysft.run.stop_file import request_stop
from raysft.run.stop_sources import asked_at, watched, watched_node
from raysft.stopping import Stopping, StopRequest, current, stoppable
from raysft.storage import lock as lock_module
from raysft.storage.lock import lost_lock
from raysft.storage.path import StoragePath
from tests.objects import Server, credentials

SECONDS = 10
"""A limit for what takes a moment."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> Iterator[None]:
    for name in ("FILE_SECONDS", "REMOTE_FILE_SECONDS", "NODE_SECONDS"):
        monkeypatch.setattr(stop_sources, name, 0.02)
    monkeypatch.setattr(stop_sources, "AGAIN_SECONDS", 0.0)
    # Who starts the tests in the background starts them with Ctrl-C switched off.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    lost_lock()  # of a test before
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before
    signal.signal(signal.SIGINT, outside)
    assert current().request is None


@pytest.fixture
def run(tmp_path) -> StoragePath:
    (tmp_path / "config.yaml").touch()
    return StoragePath.of(tmp_path)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def watch(run: StoragePath, work: Callable[[], None], notify: Callable[[str], None] = print) -> None:
    """Work under the watch of all that may ask a run to stop."""
    with watched(run, None, notify):
        work()


def watch_ending(run: StoragePath, work: Callable[[], None], notify: Callable[[str], None] = print) -> None:
    """Work that ends by itself when it is asked to, under the same watch."""
    with watched(run, None, notify), current().ending_by_itself():
        work()


def asked() -> StopRequest:
    """The request that the run of this thread gets."""
    limit = time.monotonic() + SECONDS
    while (request := current().request) is None:
        assert time.monotonic() < limit, "nobody asks"
        time.sleep(0.005)
    return request


def test_the_first_request_counts_and_a_later_one_adds_when_the_machine_goes():
    it, heard = Stopping(), []
    with it.telling(heard.append):
        it.ask("SIGTERM")
        it.ask("the node is drained", 7.0)
        it.ask("the node is drained", 9.0)
    assert heard == [StopRequest("SIGTERM")]
    assert it.request == StopRequest("SIGTERM", 7.0)
    with it.telling(heard.append):
        pass
    assert len(heard) == 2, "who comes later hears it at once"


def test_a_run_within_a_run_is_a_part_of_it():
    with stoppable() as trial:
        with stoppable() as inner:
            assert inner is trial is current()
        trial.ask("the sweep is to stop")
        with pytest.raises(RunStopped, match=r"^stopped: the sweep is to stop; 3 of 4 are kept$"):
            current().check("3 of 4 are kept")
    assert current() is not trial


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_ends_at_once_what_has_nothing_to_save(run, number, name):
    def work() -> None:
        send(number)
        time.sleep(SECONDS)
        pytest.fail("it goes on")

    with pytest.raises(RunStopped, match=f"^stopped: {name}$"):
        watch(run, work)


def test_work_that_ends_by_itself_is_asked_and_told_and_interrupted_by_the_second_signal_only(run):
    said: list[str] = []

    def work() -> None:
        send(signal.SIGTERM)
        assert asked() == StopRequest("SIGTERM")
        send(signal.SIGINT)
        time.sleep(SECONDS)

    with pytest.raises(KeyboardInterrupt):
        watch_ending(run, work, said.append)
    assert said == [
        "SIGTERM: the run will end as soon as its work is saved; press Ctrl-C or send SIGTERM again to end it immediately"
    ]


def test_one_signal_that_arrives_twice_is_one(run, monkeypatch):
    monkeypatch.setattr(stop_sources, "AGAIN_SECONDS", 60.0)
    with watched(run, None, print), current().ending_by_itself():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert asked().reason == "SIGTERM"


def test_a_signal_between_the_stages_counts_before_the_next_one(run):
    def work() -> None:
        with current().ending_by_itself():
            send(signal.SIGTERM)
            asked()
        with current().ending_by_itself():
            pytest.fail("the next stage begins")

    with pytest.raises(RunStopped):
        watch(run, work)


def test_ctrl_c_that_is_switched_off_stays_so(run):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched(run, None, print):
            send(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_leaves_signals_alone(run):
    def works() -> None:
        with watched(run, None, print):
            found.append({number: signal.getsignal(number) for number in before})

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    found: list[object] = []
    thread = threading.Thread(target=works)
    thread.start()
    thread.join(SECONDS)
    assert found == [before]


def test_a_run_whose_directory_another_process_took_over_is_interrupted_and_not_asked(run):
    def work() -> None:
        lock_module._lost.set()
        send(signal.SIGTERM)
        time.sleep(SECONDS)

    with pytest.raises(KeyboardInterrupt):
        watch_ending(run, work)
    assert not lock_module.lost_lock(), "the next run is not concerned"


def asked_by_file(run: StoragePath) -> None:
    request_stop(run, "alice needs the GPUs")
    asked()
    current().check()


def test_the_file_asks_and_is_gone_afterwards(run):
    with pytest.raises(RunStopped, match=r"^stopped: alice needs the GPUs$"):
        watch(run, lambda: asked_by_file(run))
    assert not (run / "stop").exists()


def test_a_file_that_was_there_before_ends_the_run_at_once_and_not_the_next_one(run):
    assert run.local
    (run.local / "stop").touch()
    with pytest.raises(RunStopped, match=f"^stopped: the file {run}/stop$"):
        watch(run, lambda: pytest.fail("it begins"))
    with watched(run, None, print):
        pass


def test_the_file_in_an_object_store(server: Server):
    run = StoragePath.of(server.uri("runs/r"))
    with credentials():
        (run / "config.yaml").write_text("run: {}")
        with pytest.raises(RunStopped, match=r"^stopped: alice needs the GPUs$"):
            watch(run, lambda: asked_by_file(run))
        assert not (run / "stop").exists()


def test_what_is_no_run_cannot_be_asked(tmp_path):
    with pytest.raises(RequestError, match=f"^{tmp_path}: contains no config.yaml; give a run directory"):
        request_stop(StoragePath.of(tmp_path), "enough")
    assert not (tmp_path / "stop").exists()


def test_a_time_limit_asks_when_it_is_over(run):
    with watched(run, 1 / 3600 / 50, print):
        assert current().request is None
        assert asked().reason == "train.max_hours=5.55556e-06 is over"
    with stoppable() as it, asked_at(it, time.time() - 5, "its time is over"):
        assert asked().reason == "its time is over"
    with stoppable() as it:
        with asked_at(it, time.time() + 0.05, "its time is over"):
            pass
        time.sleep(0.1)
        assert it.request is None, "a limit is that of its block"


def test_a_time_limit_may_be_as_long_as_anybody_likes(run, monkeypatch):
    failed: list = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with watched(run, 1e300, print):
        time.sleep(0.05)
    assert failed == []


def test_a_request_that_comes_when_the_end_is_under_way_does_not_end_the_next_run(run, monkeypatch):
    monkeypatch.setattr(stop_sources, "FILE_SECONDS", 60)
    with watched(run, None, print):
        request_stop(run, "too late")
    assert not (run / "stop").exists()


def test_only_the_drivers_own_node_ends_the_run(monkeypatch):
    """Workers on another one restart elsewhere."""
    draining: dict[str, float | None] = {"b" * 56: 5.0}
    looks: list[int] = []

    def nodes() -> dict[str, float | None]:
        looks.append(1)
        if len(looks) == 2:
            raise RuntimeError("the cluster does not respond")
        return draining

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "a" * 56))
    monkeypatch.setattr(ray_internals, "draining_nodes", nodes)
    with stoppable() as it, watched_node():
        limit = time.monotonic() + SECONDS
        while len(looks) < 4 and time.monotonic() < limit:
            time.sleep(0.005)
        assert it.request is None
        draining["a" * 56] = 1234.5
        request = asked()
    assert request.reason == "the driver's node aaaaaaaa is drained"
    assert (request.until, request.elsewhere) == (1234.5, True)


def test_the_line_says_how_long_the_machine_is_there():
    request = StopRequest("node a is drained", time.time() + 21.5)
    assert stop_sources._announcement(request, False) == (
        "node a is drained: the run will end as soon as its work is saved, 21 s before the machine is taken away"
    )
