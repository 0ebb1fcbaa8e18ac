"""The small files of a run in an object store, and its lock there."""

import json
import os
import shutil
import time
from dataclasses import asdict, replace

import pytest

from raysft.errors import RunFailed
from raysft.storage import lock as lock_module
from raysft.storage import sync
from raysft.storage.json_files import append_json
from raysft.storage.lock import Locked, LockOwner, lock
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import Sync, open_read_only, synced


@pytest.fixture
def run(server, tmp_path, monkeypatch) -> RunDirectory:
    """An empty run directory in the object store."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield RunDirectory.of(StoragePath.of(server.uri(f"{tmp_path.name}/runs/r")))
    server.heals()


def test_what_must_be_there_first_does_not_wait_for_its_turn(run, monkeypatch):
    monkeypatch.setattr(sync, "EVERY_SECONDS", 600)
    with synced(run, print) as push:
        run.config.write_text("run: {}")
        assert not (run.place / "config.yaml").exists()
        push()
        assert (run.place / "config.yaml").read_text() == "run: {}"


def test_files_go_there_as_they_change_and_come_from_there(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sync, "EVERY_SECONDS", 0.1)
    assert run.path.is_relative_to(tmp_path / "home" / ".cache" / "raysft" / "runs")
    (run.checkpoints / "checkpoint_1" / "part").write_text("large")
    (run.place / "results.json").write_text("there")
    (run.place / "old.partial").write_text("x")
    run.path.mkdir(parents=True)
    (run.path / "left-behind").write_text("by another life")
    with synced(run, print):
        assert sorted(path.name for path in run.path.iterdir()) == ["old.partial", "results.json"]
        (run.path / "old.partial").unlink()
        append_json(run.trainer_log, {"step": 1})
        (run.path / "tensorboard").mkdir()
        (run.path / "tensorboard" / "events").write_text("1")
        (run.path / ".predictions.partial").write_text("2")
        (run.path / ".draft.1234").write_text("3")
        limit = time.monotonic() + 20
        while not ((run.place / "trainer_log.jsonl").exists() and not (run.place / "old.partial").exists()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        append_json(run.trainer_log, {"step": 2})
        (run.path / "results.json").write_text("here")
        run.page.write_text("made at the end")
    assert list(run.place.walk()) == [
        ".predictions.partial",
        "checkpoints/checkpoint_1/part",
        "report.html",
        "results.json",
        "tensorboard/events",
        "trainer_log.jsonl",
    ]
    assert (run.place / "results.json").read_text() == "here"
    assert (run.place / "trainer_log.jsonl").read_text().count("step") == 2


def test_predictions_during_a_training_are_fetched_again_but_not_the_models(run, tmp_path):
    (run.step_model(4) / "config.json").write_text("{}")  # a worker writes it there
    with synced(run, print):
        step = run.generation(4)
        step.path.mkdir(parents=True)
        (step.path / ".generated_predictions.jsonl.partial").write_text("1")
    shutil.rmtree(run.path)
    with synced(run, print):
        files = [path for path in run.path.rglob("*") if path.is_file()]
        assert files == [step.path / ".generated_predictions.jsonl.partial"]
        files[0].unlink()
        step.predictions.write_text("2")
    assert list(run.place.walk()) == ["generation/4/generated_predictions.jsonl", "generation/4/model/config.json"]


def test_what_did_not_change_is_not_sent_again(run, server):
    sent = Sync(run, print)
    sent.fetch()
    run.config.write_text("a: 1")
    sent.push()
    asked = len(server.requests)
    sent.push()
    assert len(server.requests) == asked


def test_what_is_no_more_is_taken_away_before_anything_is_brought(run, monkeypatch):
    run.path.mkdir(parents=True)
    run.results("train").write_text("{}")
    Sync(run, print).push()
    killed = Sync(run, print)
    killed.fetch()
    run.results("train").unlink()
    run.config.write_text("epochs: 3")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StoragePath, "upload", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.push()
    assert not (run.place / "train_results.json").exists(), "a new config beside old results would count as done"


def test_the_config_is_brought_last(run, server):
    """Whoever finds it finds the plan, too, and the settings that changed."""
    run.path.mkdir(parents=True)
    for file in (run.config, run.plan, run.changes, run.rejected, run.trainer_log):
        file.write_text("{}")
    Sync(run, print).push()
    brought = [request.partition("?")[0].rpartition("/")[2] for request in server.requests if "/r/" in request]
    assert brought[-1] == "config.yaml"
    assert {"plan.json", "changes.jsonl"} <= set(brought[:-1])


def test_a_storage_that_is_away_is_said_once_and_the_files_follow(run, server, monkeypatch):
    monkeypatch.setattr(sync, "EVERY_SECONDS", 0.1)
    said: list[str] = []
    with synced(run, said.append):
        server.fails("PUT", seconds=600)
        run.config.write_text("a: 1")
        limit = time.monotonic() + 30
        while not said:
            assert time.monotonic() < limit
            time.sleep(0.05)
        server.heals()
    assert len(said) == 1
    assert said[0].startswith(f"{run.place}/config.yaml: no answer from the storage")
    assert run.place.entries().keys() == {"config.yaml"}


def test_a_storage_that_stays_away_at_the_end_is_one_line(run, server, monkeypatch):
    monkeypatch.setattr("raysft.storage.retry.RETRY_SECONDS", 1.0)

    def works():
        with synced(run, lambda line: None):
            server.fails("PUT", seconds=600)
            run.config.write_text("a: 1")

    with pytest.raises(RunFailed, match=r"the last files of the run are only in .*; copy them to s3://"):
        works()


def test_who_only_looks_leaves_the_working_copy_alone(run):
    run.path.mkdir(parents=True)
    run.config.write_text("of who works here")
    (run.place / "config.yaml").write_text("there")
    with open_read_only(run.place, print, back=True) as directory:
        assert directory.config.read_text() == "there"
        directory.model_card.write_text("card")
    assert run.config.read_text() == "of who works here"
    assert (run.place / "README.md").read_text() == "card"


def test_the_lock_of_an_object_store(run, monkeypatch):
    monkeypatch.setattr(lock_module, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock_module, "DEAD_SECONDS", 0.6)
    file = run.place / ".lock"
    with lock(run.place):
        assert json.loads(file.read_text())["process"] == os.getpid()
        with pytest.raises(Locked, match=f"{run.place}: process {os.getpid()} on"), lock(run.place):
            pass
        limit = time.monotonic() + 20
        while not json.loads(file.read_text())["beat"]:
            assert time.monotonic() < limit
    assert not file.exists()
    file.write_text(json.dumps(asdict(replace(LockOwner.me(), host="elsewhere", process=7))))
    said: list[str] = []
    with lock(run.place, said.append):
        assert said == [f"{run.place}: process 7 on elsewhere uses this folder; waiting 1 s for its heartbeat"]
        # Another took it in the same moment, and was later.
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: file.write_text(json.dumps(asdict(LockOwner.me()))))
    with pytest.raises(Locked, match="another process took the lock at the same moment"), lock(run.place):
        pass


def test_runs_of_the_same_name_on_two_servers_have_a_working_copy_each():
    one, other = (StoragePath.of(f"s3://bucket/runs/r?endpoint_override=http://{host}") for host in ("one", "other"))
    assert RunDirectory.of(one).path != RunDirectory.of(other).path
    assert RunDirectory.of(one).path == RunDirectory.of(one).path
