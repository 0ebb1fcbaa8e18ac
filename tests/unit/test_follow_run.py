"""A run is followed through its files when its cluster is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from raysft.cli import main
from raysft.config import parse
from raysft.errors import RunFailed
from raysft.storage.lock import lock
from raysft.storage.path import StoragePath
from raysft.submit import follow, follow_run
from raysft.submit.follow_run import go_on_from_files
from raysft.submit.following import Lost
from raysft.telemetry.train_log import evaluation_line, progress_line
from tests.dashboards import Job, Tail, dashboard, forget_clusters
from tests.messages import holds
from tests.objects import Server
from tests.unit.test_train_log import step

CONFIG = {
    "run": {"name": "toy", "storage": "/x"},
    "model": {"path": "org/model"},
    "data": {"train": [{"name": "a", "path": "/x/a.jsonl"}], "holdout": 0.1},
}
EVALUATION = {"eval_loss": 2.25, "eval_perplexity": 9.49, "eval_accuracy": 0.5, "eval_tokens": 1234}
LOST = Lost("http://head:8265 has not responded for 10 minutes; the job may be running")


class Run:
    """A run directory that a process works in; every look at its log is followed by the next event."""

    def __init__(self, place: StoragePath, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.records = place, [asdict(step(number, loss=3 - number / 10)) for number in (1, 2, 3)]
        self.records.insert(2, {"current_steps": 2, "total_steps": 10, **EVALUATION})
        self.events: list[Callable[[], None]] = []
        self.write()
        (place / "config.yaml").write_text(parse(CONFIG).to_yaml())
        for name in ("POLL_SECONDS", "REMOTE_POLL_SECONDS"):
            monkeypatch.setattr(follow_run, name, 0.01)
        monkeypatch.setattr(follow_run, "HOLDER_SECONDS", -1)
        original = follow_run._Progress.look

        def look(progress: follow_run._Progress) -> None:
            original(progress)
            if self.events:
                self.events.pop(0)()

        monkeypatch.setattr(follow_run._Progress, "look", look)

    def write(self) -> None:
        (self.place / "trainer_log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in self.records))

    def add(self, number: int) -> None:
        self.records.append(asdict(step(number, loss=3 - number / 10)))
        self.write()

    def go_back(self, number: int) -> None:
        self.records = [record for record in self.records if record["current_steps"] <= number]
        self.write()

    def end(self) -> None:
        (self.place / "model" / "config.json").write_text("{}")
        (self.place / "train_results.json").write_text("{}")


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    (tmp_path / "toy" / "model").mkdir(parents=True)
    return Run(StoragePath.of(tmp_path / "toy"), monkeypatch)


def line(number: int) -> str:
    return step(number, loss=3 - number / 10).line()


def followed(run: Run, shown: str = "") -> tuple[int, list[str]]:
    notices: list[str] = []
    return go_on_from_files(run.place, LOST, shown, notices.append), notices


def test_what_comes_after_the_shown_output_is_shown_until_the_run_is_done(run):
    with lock(run.place):
        run.events = [lambda: run.add(4), lambda: run.add(5), run.end, (run.place / ".lock").remove]
        code, notices = followed(run, f"model: 1.0M parameters\n{line(1)}\n{line(2)}\n")
    assert code == 0
    assert notices == [
        str(LOST),
        f"continuing with {run.place}/trainer_log.jsonl, which has its steps and evaluations, but no other output",
        f"after step 2 | {evaluation_line(EVALUATION)}",
        *map(line, (3, 4, 5)),
        f"{run.place}: is done",
    ]


def test_a_run_of_which_nothing_was_shown_begins_with_its_last_step(run):
    run.end()
    assert followed(run)[1][2:] == [line(3), f"{run.place}: is done"]


def test_a_run_that_resumes_meanwhile_shows_where(run):
    run.events = [lambda: run.add(4), lambda: run.go_back(2), lambda: run.add(3), run.end]
    code, notices = followed(run, line(3))
    assert code == 0
    assert notices[2:] == [
        line(4),
        f"{run.place}: went back to step 2, that of its checkpoint",
        line(3),
        f"{run.place}: is done",
    ]


def test_a_run_that_nobody_goes_on_with_is_not_waited_for_forever(run, monkeypatch):
    monkeypatch.setattr(follow_run, "GONE_SECONDS", 0.1)
    with pytest.raises(RunFailed) as caught:
        followed(run)
    assert not isinstance(caught.value, Lost)
    assert holds(str(caught.value), f"{run.place}: is not done, and no process … submit it again … newest checkpoint")


def test_ctrl_c_ends_it_and_says_how_to_look(run):
    def press() -> None:
        raise KeyboardInterrupt

    run.events = [press]
    code, notices = followed(run)
    assert code == 130
    assert notices[-1] == f"\n{run.place}: is still running; check on it with: raysft status {run.place}"


def test_a_run_directory_that_this_machine_does_not_see_leaves_the_error_as_it_was(tmp_path):
    for place in (StoragePath.of(tmp_path / "none"), None):
        with pytest.raises(Lost) as caught:
            go_on_from_files(place, LOST, "", print)
        assert caught.value is LOST


def test_a_run_in_an_object_store_is_followed_too(server: Server, monkeypatch):
    run = Run(StoragePath.of(server.uri("runs/toy")), monkeypatch)
    run.events = [lambda: run.add(4), run.end]
    code, notices = followed(run, line(3))
    assert code == 0
    assert notices[2:] == [line(4), f"{run.place}: is done"]


def test_a_loss_that_is_not_finite_is_shown_as_such():
    record = {**asdict(step(4, loss=1.0)), "loss": None, "of_a_later_version": 1}
    assert "step 4/" in progress_line(record)
    assert "loss nan" in progress_line(record)


def test_following_a_job_goes_on_from_the_files_of_its_run(run, tmp_path, monkeypatch, capsys):
    """The cluster itself has told where they are."""
    forget_clusters(monkeypatch, tmp_path / "home")
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(follow, name, 0.01)
    monkeypatch.setattr(follow, "LOST_SECONDS", 0.2)
    log = f"{line(1)}\n{line(2)}\n"
    run.end()
    with dashboard() as server:
        server.jobs["j"] = Job(log, [Tail(len(log), "close")] * 9, about={"run_directory": str(run.place)})
        original = follow.Jobs.details
        asked = iter(range(1000))

        def details(jobs: follow.Jobs, job: str) -> object:
            if next(asked) > 1:
                raise follow.Unreachable("Connection refused")
            return original(jobs, job)

        monkeypatch.setattr(follow.Jobs, "details", details)
        assert main(["follow", "j", "--to", server.url]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(log)
    assert out.splitlines()[4:] == [
        f"after step 2 | {evaluation_line(EVALUATION)}",
        line(3),
        f"{run.place}: is done",
    ]
    assert "does not respond" in err
