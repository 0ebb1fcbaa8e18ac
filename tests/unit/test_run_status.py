"""`raysft status RUN_DIR` tells from files alone how a run is, who works on it and what to do next."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from raysft.cli import main
from raysft.config import parse
from raysft.errors import RunStopped
from raysft.run.stop_sources import watched
from raysft.stopping import current
from raysft.storage import lock as lock_module
from raysft.storage.lock import LockOwner, lock
from raysft.storage.path import StoragePath
from raysft.submit import stop_run
from raysft.train.checkpoint import parts
from raysft.train.checkpoint.catalog import folder_name
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.parts import Snapshot
from tests.messages import holds
from tests.objects import Server

CONFIG = {
    "run": {"name": "toy", "storage": "/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"name": "a", "path": "/x/a.jsonl"}], "holdout": 0.1},
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory after three of ten steps."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "config.yaml").write_text(parse(CONFIG).to_yaml())
    steps = [{"current_steps": step, "total_steps": 10, "loss": 3.0 - step / 2} for step in (1, 2, 3)]
    steps.insert(2, {"current_steps": 2, "total_steps": 10, "eval_loss": 2.25})
    (folder / "trainer_log.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return folder


@pytest.fixture
def status(capsys) -> Callable[..., dict[str, str]]:
    """The lines of the command by their names."""

    def status(run: Path | str) -> dict[str, str]:
        assert main(["status", str(run)]) == 0
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return status


def aged(file: Path, seconds: float) -> None:
    """Set a file's time to some seconds ago."""
    os.utime(file, (time.time() - seconds,) * 2)


def save(run: StoragePath | Path, step: int) -> StoragePath:
    """Write a complete checkpoint."""
    folder = StoragePath.of(run) / "checkpoints" / folder_name(step, "a")
    parts.write(Snapshot(0, {}, {}, Cursor(step, 4 * step, 0, {})), folder)
    return folder


def end(run: Path) -> None:
    """Write what the end of a training writes."""
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (run / "train_results.json").write_text("{}")


def test_a_run_that_nobody_works_on_goes_on_from_its_checkpoint(run, status):
    cursor = (save(run, 2) / "cursor.json").local
    assert cursor
    aged(cursor, 3600)
    aged(run / "trainer_log.jsonl", 75)
    lines = status(run)
    assert re.fullmatch("0:01:1[5-9] old", lines.pop("last record"))
    assert re.fullmatch("after step 2, 1:00:0[0-4] old", lines.pop("checkpoint"))
    assert lines == {
        "run": f"toy in {run}",
        "state": "not running",
        "progress": "step 3 of 10, loss 1.5000, eval loss 2.2500 at step 2",
        "next": "the command that started it resumes it from the newest checkpoint",
    }


def test_who_works_on_a_run_is_named(run, status):
    with lock(run):
        lines = status(run)
    assert lines["state"].startswith(f"running, process {os.getpid()} on ")
    assert lines["checkpoint"] == "none"


def test_a_heartbeat_from_another_machine_is_waited_for(run, status, monkeypatch):
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 0.4)
    owner = LockOwner("elsewhere", 7, 0.0, "token", processes="another boot")
    (run / ".lock").write_text(json.dumps(asdict(owner)))
    assert status(run)["state"] == "not running"  # no heartbeat has come
    original = lock_module._read_owner
    beats = iter(range(100))
    monkeypatch.setattr(lock_module, "_read_owner", lambda file, token=None: replace(original(file), beat=next(beats)))
    assert status(run)["state"] == "running, process 7 on elsewhere"


def test_a_run_that_is_done_has_a_report(run, status):
    end(run)
    lines = status(run)
    assert (lines["state"], lines["next"]) == ("done", f"raysft report {run}")
    assert "checkpoint" not in lines


def test_a_run_without_a_step_and_one_that_only_generates(run, status):
    (run / "trainer_log.jsonl").unlink()
    lines = status(run)
    assert (lines["state"], lines["progress"]) == ("not running", "no step yet")
    assert "last record" not in lines
    (run / "config.yaml").write_text(parse(CONFIG | {"generate": {"model": "org/other"}}).to_yaml())
    lines = status(run)
    assert (lines["state"], lines["next"]) == ("not running", "run the command that started it again")
    assert "checkpoint" not in lines
    (run / "predict_results.json").write_text("{}")
    assert status(run)["state"] == "done"


def test_a_sweep_counts_its_trials_by_their_last_state(run, status):
    (run / "trainer_log.jsonl").unlink()
    states = [("a", "running"), ("b", "running"), ("a", "done"), ("c", "failed")]
    lines = [json.dumps({"trial": name, "state": state}) for name, state in states]
    (run / "trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = status(run)
    assert found["state"] == "not running"
    assert found["progress"] == "3 trials begun: 1 done, 1 running, 1 failed"
    assert "checkpoint" not in found


def test_what_cannot_be_read_is_said_and_the_rest_is_shown(run, status):
    (run / "trials.jsonl").write_text('{"trial": "a", "state": "done"}\n{"trial": \n')
    lines = status(run)
    assert "trials.jsonl:2: invalid JSON" in lines["problem"]
    assert lines["progress"] == "1 trials begun: 1 done"
    (run / "trials.jsonl").unlink()
    (run / "plan.json").write_text("{")
    lines = status(run)
    assert "plan.json:1: invalid JSON" in lines["problem"]
    assert lines["progress"].startswith("step 3 of 10")


def test_a_run_in_an_object_store_is_read_and_left_as_it_is(server: Server, run, status):
    place = StoragePath.of(server.uri("runs/toy"))
    place.upload(run)
    save(place, 3)
    before = set(place.walk())
    with lock(place):
        lines = status(server.uri("runs/toy"))
    assert lines["run"] == f"toy in s3://{server.bucket}/runs/toy"
    assert lines["state"].startswith(f"running, process {os.getpid()} on ")
    assert lines["progress"].startswith("step 3 of 10, loss 1.5000")
    assert holds(lines["checkpoint"], "after step 3, 0:00:0 … old")
    assert set(place.walk()) == before


@pytest.mark.parametrize(
    ("folder", "parts_"), [("none", "no such run directory; … for a job, add --to"), ("", "no config.yaml")]
)
def test_what_is_no_run_directory_is_one_line(tmp_path, capsys, folder, parts_):
    assert main(["status", str(tmp_path / folder)]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), f"raysft: error: {tmp_path} … {parts_}")


def test_a_run_is_stopped_through_its_directory_alone(run, capsys, monkeypatch):
    monkeypatch.setattr(stop_run, "POLL_SECONDS", 0.02)
    ended: list[str] = []

    def works() -> None:
        try:
            with lock(run, ended.append), watched(StoragePath.of(run), None, ended.append):
                begun.set()
                for _ in range(1000):
                    time.sleep(0.01)
                    current().check()
        except RunStopped as stopped:
            ended.append(str(stopped))

    begun, thread = threading.Event(), threading.Thread(target=works)
    thread.start()
    assert begun.wait(10)
    assert main(["stop", str(run)]) == 0
    thread.join(10)
    first, last = capsys.readouterr().out.splitlines()
    assert holds(first, f"{run}: process {os.getpid()} on … was asked to save its work and end; waiting up to 10 min")
    assert last == f"{run}: has ended"
    assert ended[-1] == f"stopped: raysft stop on {socket.gethostname()}"
    assert not (run / "stop").exists()


def test_a_run_that_is_killed_meanwhile_is_not_waited_for(run, capsys, monkeypatch):
    monkeypatch.setattr(stop_run, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(stop_run, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stop_run, "request_stop", lambda place, reason: (run / "stop").touch() or worker.kill())
    with subprocess.Popen(["sleep", "60"]) as worker:
        born = lock_module._born(psutil.Process(worker.pid))
        owner = replace(LockOwner.me(), process=worker.pid, born=born)
        (run / ".lock").write_text(json.dumps(asdict(owner)))
        assert main(["stop", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{run}: has ended"
    assert not (run / "stop").exists(), "the next command would end at once"


def test_where_nothing_runs_nothing_is_stopped_later(run, capsys):
    assert main(["stop", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}: no process is running in it\n"
    assert not (run / "stop").exists()
    assert main(["stop", str(run / "none")]) == 2
    assert holds(capsys.readouterr().err.rstrip("\n"), f"raysft: error: {run}/none: no such run directory; … --to")
