"""Following a job shows each character of its log once and ends as the job does, whatever happens to the connection."""

from __future__ import annotations

import time
from typing import Any

import pytest

from raysft.errors import RunFailed
from raysft.submit import follow as following
from raysft.submit.follow import ShownLog, exit_code, follow
from raysft.submit.jobs_internals import Jobs, UnknownJob
from tests.dashboards import FAILED, RUNNING, STOPPED, SUCCEEDED, Dashboard, Job, Tail, dashboard, forget_clusters

LOG = "2026-11-26 16:00:01,123\tINFO job_manager.py -- Runtime env is setting up.\n" + "".join(
    f"step {step}/400 | loss {9 / step:.4f} | größer\n" for step in range(1, 401)
)


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    forget_clusters(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(following, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(following, "LONGEST_PAUSE", 0.02)


def followed(server: Dashboard, name: str = "job") -> tuple[str, int, list[str]]:
    """What is shown, the exit code and the notices."""
    shown: list[str] = []
    notices: list[str] = []
    details = follow(Jobs(server.url), name, ShownLog(shown.append), notices.append)
    return "".join(shown), exit_code(details), notices


@pytest.mark.parametrize(
    "tails",
    [
        pytest.param([Tail(len(LOG), "close")], id="undisturbed"),
        pytest.param([Tail(1000), Tail(3000), Tail(len(LOG))], id="cut twice"),
        pytest.param([Tail(5000), Tail(10), Tail(0), Tail(4999), Tail(5001)], id="cut before what was shown"),
        pytest.param([Tail(0), Tail(0)], id="never a character"),
        pytest.param([Tail(700, "close"), Tail(9000, "close")], id="ends silently while the job runs"),
        pytest.param([Tail(4096), Tail(4095), Tail(4097)], id="at the length by which logs are told apart"),
    ],
)
def test_a_log_is_shown_once_and_whole(tails):
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, tails)
        shown, code, notices = followed(server)
    assert shown == LOG
    assert code == 0
    assert notices == []


def test_a_cluster_that_does_not_answer_is_asked_again_and_both_is_said_once():
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, [Tail(1000)] * 3)
        server.silent_answers = 7
        shown, code, notices = followed(server)
    assert (shown, code) == (LOG, 0)
    lost, back = notices
    assert lost.startswith(f"{server.url} does not respond (503, no healthy upstream); trying again")
    assert back == f"{server.url} answers again"


def test_a_connection_that_dies_without_a_sign_is_opened_again(monkeypatch):
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.2)
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, [Tail(1000, "hang"), Tail(2000, "close")])
        shown, code, _ = followed(server)
    assert (shown, code) == (LOG, 0)


def test_the_log_of_a_job_that_a_new_head_has_started_again_is_shown_as_well():
    other = LOG.replace("16:00:01", "16:20:59").replace("loss 9.0", "loss 8.0")
    parts: list[str] = []
    log = ShownLog(parts.append)
    log.feed(LOG[:500])
    log.restart()
    for start in range(0, len(other), 7):  # the first parts are equal in both
        log.feed(other[start : start + 7])
    log.restart()
    log.feed(other)
    assert "".join(parts) == LOG[:500] + other


@pytest.mark.parametrize(
    ("end", "recorded", "code"),
    [
        (SUCCEEDED, 0, 0),
        (FAILED, 1, 1),
        (FAILED, 2, 2),
        (FAILED, 75, 75),
        (FAILED, 130, 130),
        (FAILED, -9, 137),
        (FAILED, None, 1),
        (STOPPED, None, 130),
    ],
)
def test_the_exit_code_is_the_drivers_own(end, recorded, code):
    with dashboard() as server:
        server.jobs["job"] = Job("line\n", [Tail(5, "close")], end=end, exit_code=recorded)
        assert followed(server)[:2] == ("line\n", code)


def test_an_unknown_job_is_known_to_be_unknown_at_once():
    with dashboard() as server, pytest.raises(UnknownJob):
        followed(server)


def test_a_cluster_that_has_forgotten_the_job_ends_the_wait(monkeypatch):
    monkeypatch.setattr(following, "FORGOTTEN_SECONDS", 0.2)
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, [Tail(1000, "close")] * 1000)
        jobs, shown, notices = Jobs(server.url), [], []

        def show(text: str) -> None:
            shown.append(text)
            server.forgotten = True

        with pytest.raises(RunFailed) as caught:
            follow(jobs, "job", ShownLog(show), notices.append)
    assert "no longer knows job" in str(caught.value)
    assert "submit it again" in str(caught.value)
    assert shown
    assert LOG.startswith("".join(shown))
    (notice,) = notices
    assert "no longer knows job; trying again" in notice


def test_a_job_that_a_new_head_gets_again_has_time_though_the_old_one_was_away_for_longer(monkeypatch):
    monkeypatch.setattr(following, "FORGOTTEN_SECONDS", 0.5)
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, [Tail(1000, "close")])
        jobs, notices = Jobs(server.url), []
        original, asked = jobs.details, iter(range(10**6))
        began = time.monotonic()

        def details(job: str) -> Any:
            passed, first = time.monotonic() - began, next(asked) == 0
            if not first and passed < 1.0:
                raise following.Unreachable("gone")
            if not first and passed < 1.3:
                raise UnknownJob("unknown")
            return original(job)

        monkeypatch.setattr(jobs, "details", details)
        assert exit_code(follow(jobs, "job", ShownLog(lambda text: None), notices.append)) == 0
    assert notices[-1] == f"{server.url} answers again"


def test_a_cluster_that_stays_away_ends_the_wait_and_says_how_to_come_back(monkeypatch):
    monkeypatch.setattr(following, "LOST_SECONDS", 0.3)
    with dashboard() as server:
        server.jobs["job"] = Job(LOG)
        jobs = Jobs(server.url)
    # The server has ended: nothing listens any more.
    notices: list[str] = []
    with pytest.raises(RunFailed) as caught:
        follow(jobs, "job", ShownLog(print), notices.append)
    assert str(caught.value).endswith(f"the job may be running: raysft follow job --to {server.url}")
    assert "Connection refused" in str(caught.value)
    assert len(notices) == 1


def test_a_log_whose_end_cannot_be_read_does_not_hold_up_the_result(monkeypatch):
    monkeypatch.setattr(following, "REST_SECONDS", 0.1)
    with dashboard() as server:
        server.jobs["job"] = Job(LOG, [Tail(1000, "close")])
        jobs, shown, notices = Jobs(server.url), [], []
        monkeypatch.setattr(jobs, "log", lambda job: (_ for _ in ()).throw(following.Unreachable("500, gone")))
        details = follow(jobs, "job", ShownLog(shown.append), notices.append)
    assert exit_code(details) == 0
    assert "".join(shown) == LOG[:1000]
    assert notices == ["job: the end of its log cannot be read (500, gone)"]


def test_a_job_that_runs_on_is_followed_while_it_prints():
    with dashboard() as server:
        job = server.jobs["job"] = Job(LOG, [Tail(900), Tail(1800), Tail(2000)])
        shown: list[str] = []

        def show(text: str) -> None:
            assert job.status == RUNNING or len("".join(shown)) >= 2000  # not only when it has ended
            shown.append(text)

        follow(Jobs(server.url), "job", ShownLog(show), print)
    assert "".join(shown) == LOG
