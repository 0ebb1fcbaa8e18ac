"""One process at a time in a run directory."""

import errno
import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from raysft.storage import lock as lock_module
from raysft.storage.lock import Locked, LockOwner, lock
from raysft.storage.path import StoragePath


def hold(folder, ready, seconds):
    with lock(folder):
        ready.set()
        time.sleep(seconds)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, 60))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_the_second_is_refused_while_the_first_lives_and_follows_when_it_is_dead(tmp_path, other):
    with pytest.raises(Locked, match=f"process {other.pid} on"), lock(tmp_path):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_whoever_has_ended_holds_nobody_off_though_nobody_has_asked_how(tmp_path, other):
    os.kill(other.pid, signal.SIGKILL)
    while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with lock(tmp_path):
        pass


def test_a_clock_that_is_set_anew_ends_no_owner(tmp_path, other):
    """The kernel counts from the machine's start, which the clock does not move (``man proc_pid_stat``, field 22)."""
    since_boot = int(Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf(
        "SC_CLK_TCK"
    )
    assert json.loads((tmp_path / ".lock").read_text())["born"] == pytest.approx(since_boot, abs=0.1)


def test_one_on_another_machine_is_given_time_for_a_sign(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 0.6)
    there = replace(LockOwner.me(), host="elsewhere", process=7)
    (tmp_path / ".lock").write_text(json.dumps(asdict(there)))
    said = []
    with lock(tmp_path, said.append):
        pass
    assert said == [f"{tmp_path}: process 7 on elsewhere uses this folder; waiting 1 s for its heartbeat"]

    (tmp_path / ".lock").write_text(json.dumps(asdict(there)))
    beats = iter([None, asdict(replace(there, beat=1))])

    def waits(seconds):
        if beat := next(beats, None):
            (tmp_path / ".lock").write_text(json.dumps(beat))

    monkeypatch.setattr(lock_module.time, "sleep", waits)
    with pytest.raises(Locked, match="process 7 on elsewhere"), lock(tmp_path, said.append):
        pass


def test_one_on_another_machine_that_ends_meanwhile_is_followed(tmp_path, monkeypatch):
    there = replace(LockOwner.me(), host="elsewhere", process=7)
    (tmp_path / ".lock").write_text(json.dumps(asdict(there)))
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: (tmp_path / ".lock").unlink(missing_ok=True))
    taken = []
    monkeypatch.setattr(lock_module, "_write", lambda file, holder: taken.append(holder))
    with pytest.raises(Locked, match="at the same moment"):
        lock_module._take(StoragePath.of(tmp_path / ".lock"), LockOwner.me(), print)
    assert taken, "it was followed; what became of the lock after that is another matter"


def test_a_lock_that_cannot_be_read_holds_nobody_off(tmp_path):
    (tmp_path / ".lock").write_text("{")
    with lock(tmp_path):
        pass


def test_a_lock_that_another_user_keeps_to_himself_is_no_dead_ones(tmp_path, monkeypatch):
    content = json.dumps(asdict(LockOwner.me()))
    (tmp_path / ".lock").write_text(content)
    read = StoragePath.read

    def refused(place, function):
        if place.name == ".lock":
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return read(place, function)

    monkeypatch.setattr(StoragePath, "read", refused)
    with pytest.raises(Locked, match="Permission denied"), lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == content


def test_a_process_of_another_container_with_this_ones_name_is_not_known_to_be_dead():
    there = replace(LockOwner.me(), process=4_000_000)
    assert there.is_alive() is False
    assert replace(there, processes="another").is_alive() is None


def test_who_was_taken_for_dead_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as a run has it
    said: list[str] = []
    there = replace(LockOwner.me(), host="elsewhere", process=7)

    def works():
        with lock(tmp_path, said.append):
            (tmp_path / ".lock").write_text(json.dumps(asdict(there)))
            time.sleep(5)

    try:
        with pytest.raises(KeyboardInterrupt):
            works()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said == [f"{tmp_path}: process 7 on elsewhere took over the lock; this process stops"]
    assert json.loads((tmp_path / ".lock").read_text())["process"] == 7, "what is another's is left alone"


def test_a_number_that_another_process_has_now_is_no_sign_of_life():
    assert LockOwner.me().is_alive()
    assert not any(replace(LockOwner.me(), process=number).is_alive() for number in (-5, 1 << 40, 1 << 70))
    assert not replace(LockOwner.me(), born=1.0).is_alive()
