"""A job in a RayJob that another start would not help is stopped, as KubeRay starts every job again that fails."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from raysft.cli import main
from raysft.errors import NotNow, RequestError, RunFailed, RunStopped
from raysft.run import pipeline
from raysft.stopping import current
from raysft.storage.lock import lock
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry
from raysft.submit import own_job
from raysft.submit.shown_log import own_exit_code
from tests.dashboards import RUNNING, STOPPED, Job, dashboard, forget_clusters
from tests.messages import holds

CONFIG = """
run: {storage: runs}
model: {path: base}
data: {train: [{name: a, path: a.jsonl}], holdout: 0.1}
"""


@pytest.fixture(autouse=True)
def _job(tmp_path, monkeypatch):
    """This process is the job ``mine``; a signal does not come."""
    forget_clusters(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "mine"}}))
    monkeypatch.setattr(own_job, "SIGNAL_SECONDS", 0)
    Path("toy.yaml").write_text(CONFIG)


@pytest.mark.parametrize(
    ("error", "asked", "code", "stopped"),
    [
        (None, None, 0, False),
        (RunFailed("x"), None, 1, False),
        (RequestError("x"), None, 2, True),
        (NotNow("x"), None, 2, False),
        (RunStopped("x"), ("train.max_hours=8 is over", False), 75, True),
        (RunStopped("x"), ("raysft stop on laptop", False), 75, True),
        (RunStopped("x"), ("the driver's node 5f1c0a92 is drained", True), 75, False),
        (RunStopped("x"), ("SIGTERM", False), 75, False),
        (RunStopped("no nodes for an hour"), None, 75, False),
    ],
)
def test_only_what_would_end_the_same_way_again_is_stopped(monkeypatch, capsys, error, asked, code, stopped):
    def run(*arguments: object, **options: object) -> None:
        if asked is not None:
            current().ask(asked[0], elsewhere=asked[1])
        if error is not None:
            raise error

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr("raysft.cluster.connect.prepare_workers", lambda config: None)
    with dashboard() as server:
        server.jobs["mine"] = Job("")
        assert main(["run", "toy.yaml", "--rayjob", server.url]) == code
        assert server.jobs["mine"].status == (STOPPED if stopped else RUNNING)
    err = capsys.readouterr().err
    lines = err.splitlines()
    assert own_exit_code("\n".join(line for line in lines if "could not" not in line)) == (code if stopped else None)


def test_a_run_directory_in_use_and_a_storage_that_is_silent_are_tried_again(monkeypatch):
    monkeypatch.setattr("raysft.cluster.connect.prepare_workers", lambda config: None)
    command = ["run", "toy.yaml", "--rayjob"]
    with dashboard() as server:
        server.jobs["mine"] = Job("")
        with lock(Path("runs", "toy")):  # of a driver that has not ended yet, for example
            assert main([*command, server.url]) == 2
        assert server.jobs["mine"].status == RUNNING
        for error, status in ((TimeoutError("no route"), RUNNING), (OSError("HTTP status 403"), STOPPED)):
            answer = partial(retry, partial(_fails, error), "s3://bucket")
            monkeypatch.setattr(StoragePath, "ensure_writable", lambda place, answer=answer: answer())
            monkeypatch.setattr("raysft.run.ownership.FIRST_SECONDS", 0)
            assert main([*command, server.url]) == 2
            assert server.jobs["mine"].status == status


def _fails(error: OSError) -> None:
    raise error


@pytest.mark.parametrize("verb", ["run", "tune", "generate"])
def test_a_wrong_request_is_stopped_with_its_message_and_its_exit_code(capsys, verb):
    with dashboard() as server:
        server.jobs["mine"] = Job("")
        assert main([verb, "toy.yaml", "train.epochs=0", "--rayjob", server.url]) == 2
        assert server.jobs["mine"].status == STOPPED
    out, err = capsys.readouterr()
    error, named, _ = err.splitlines()
    assert (out, own_exit_code(f"{error}\n{named}\n")) == ("", 2)
    assert holds(error, "raysft: error: … train.epochs=0")


@pytest.mark.parametrize(("job", "reason"), [("mine", "Connection refused"), (None, "not a Ray job")])
def test_a_job_that_cannot_be_stopped_says_so_and_ends_as_before(monkeypatch, capsys, job, reason):
    if job is None:
        monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert main(["run", "none.yaml", "--rayjob", "http://127.0.0.1:1"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert holds(last, f"raysft: the job could not be stopped ( … {reason} … so KubeRay will restart it")
