"""A job on Kubernetes is followed through kubectl to its end, whatever becomes of pods and connections."""

from __future__ import annotations

from typing import Any

import pytest

from raysft.cli import main
from raysft.config import load
from raysft.errors import RequestError, RunFailed
from raysft.submit.following import Lost
from raysft.submit.kubernetes import follow, log_stream
from raysft.submit.kubernetes.names import job_name
from raysft.submit.shown_log import STOPPED_WITH, ShownLog
from tests.kubernetes import Kubernetes, failed, ray_job
from tests.messages import holds

LOG = "2026-11-26 16:00:01,123\tINFO job_manager.py -- Runtime env is setting up.\n" + "".join(
    f"step {step}/400 | loss {9 / step:.4f} | größer\n" for step in range(1, 401)
)
OTHER = LOG.replace("16:00:01", "16:20:59")
SIZE = len(LOG.encode())
RUNNING, DONE = ray_job("Running", "RUNNING"), ray_job("Complete", "SUCCEEDED")
REFUSED = "The connection to the server 10.0.0.1:6443 was refused - did you specify the right host or port?"
CONFIG = """
run: {storage: s3://bucket/runs}
model: {path: org/model}
data:
  train: [{name: a, path: s3://bucket/a.jsonl}]
  holdout: 0.1
cluster: {image: example.com/raysft:1, namespace: team}
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Kubernetes:
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(follow, "REST_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    found = Kubernetes(tmp_path, monkeypatch)
    found.log("head-1", "job-1", LOG)
    return found


class Followed:
    """What following a job shows; once the whole log is there, the job goes on to other states."""

    def __init__(self, cluster: Kubernetes, *then: Any, whole: str = LOG) -> None:
        self.parts: list[str] = []
        self.notices: list[str] = []
        self._cluster, self._then, self._whole = cluster, then, whole

    def show(self, text: str) -> None:
        self.parts.append(text)
        if self._then and self.shown == self._whole:
            self._cluster.states(*self._then)

    @property
    def shown(self) -> str:
        return "".join(self.parts)

    def to_end(self) -> int:
        return follow.follow_to_end("x", ["--namespace", "team"], self.notices.append, ShownLog(self.show))


def test_a_job_is_started_and_followed_to_its_end(cluster, tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text(CONFIG)
    cluster.states(ray_job(""), ray_job("Initializing"), ray_job("Running"), RUNNING, RUNNING, DONE)
    assert main(["submit", "toy.yaml", "--to", "kubernetes", "--follow"]) == 0
    out, err = capsys.readouterr()
    name = job_name(load("toy.yaml"))
    before, after = out.split(LOG)
    assert before.splitlines()[-3:] == [
        "rayjob.ray.io/x serverside-applied",
        f"{name}: initializing",
        f"{name}: running",
    ]
    assert (after, err) == (f"{name}: has succeeded\n", "")
    assert all("--namespace team" in call for call in cluster.calls)


def test_a_log_is_shown_while_the_job_runs(cluster):
    followed = Followed(cluster, DONE)
    cluster.states(RUNNING)
    assert followed.to_end() == 0
    assert followed.shown == LOG
    assert followed.notices == ["x: running", "x: has succeeded"]


@pytest.mark.parametrize(
    ("end", "log", "code", "ending"),
    [
        (failed(1), "", 1, "failed with exit code 1"),
        (failed(2), "", 2, "failed with exit code 2"),
        (failed(75), "", 75, "failed with exit code 75"),
        (failed(-9), "", 137, "failed with exit code 137"),
        (ray_job("Complete", "STOPPED", message="Job was intentionally stopped."), "", 130, "been stopped"),
        (ray_job("Complete", "STOPPED"), STOPPED_WITH.format(code=2) + "\n", 2, "ended with exit code 2"),
        (
            ray_job(
                "Failed",
                "RUNNING",
                message="The RayJob has passed the activeDeadlineSeconds.\nIts pods",
                reason="DeadlineExceeded",
            ),
            "",
            1,
            "failed (DeadlineExceeded: The RayJob has passed the activeDeadlineSeconds)",
        ),
    ],
)
def test_the_exit_code_is_the_drivers_own(cluster, end, log, code, ending):
    cluster.log("head-1", "job-1", LOG + log)
    cluster.states(RUNNING, end)
    followed = Followed(cluster)
    assert followed.to_end() == code
    assert followed.shown == LOG + log
    assert followed.notices[-1] == f"x: has {ending}"


@pytest.mark.parametrize(
    "error",
    [
        "Error from server: error dialing backend: dial tcp 10.0.0.7:10250: connect: connection refused",
        "command terminated with exit code 137",
        'error: unable to upgrade connection: container not found ("ray-head")',
        "",
    ],
)
def test_a_connection_that_breaks_is_opened_again_and_nothing_is_shown_twice(cluster, error):
    cluster.breaks((1000, error), (0, error), (5000, error), (4999, error), None)
    cluster.states(RUNNING)
    followed = Followed(cluster, DONE)
    assert followed.to_end() == 0
    assert followed.shown == LOG
    reason = error or "the connection was closed"
    assert followed.notices[1] == f"the log in pod head-1 cannot be read now ({reason}); trying again"
    assert followed.notices[2] == "the log in pod head-1 can be read again"


def test_a_connection_that_dies_without_a_sign_is_opened_again(cluster, monkeypatch):
    monkeypatch.setattr(log_stream, "QUIET_SECONDS", 0.1)
    cluster.breaks((1000, "hang"), (1000, "hang"), None)
    cluster.states(RUNNING)
    followed = Followed(cluster, DONE)
    assert followed.to_end() == 0
    assert followed.shown == LOG
    assert followed.notices == ["x: running", "x: has succeeded"]


def test_a_job_that_kuberay_starts_again_is_followed_on_its_new_cluster(cluster):
    cluster.log("head-2", "job-2", OTHER)
    states = [ray_job("", number=2), ray_job("Initializing", number=2), ray_job("Running", "RUNNING", 2)]
    cluster.states(RUNNING)
    followed = Followed(cluster)

    def show(text: str) -> None:
        followed.parts.append(text)
        if followed.shown == LOG:
            cluster.states(failed(75, deployment="Retrying"), *states)
        elif followed.shown == LOG + OTHER:
            cluster.states(ray_job("Complete", "SUCCEEDED", 2))

    assert follow.follow_to_end("x", [], followed.notices.append, ShownLog(show)) == 0
    assert followed.shown == LOG + OTHER
    assert followed.notices == [
        "x: running",
        "x: retrying (attempt 1 of 4 has failed with exit code 75)",
        "x: initializing",
        "x: running",
        "x: has succeeded",
    ]


def test_a_head_that_is_lost_is_replaced_by_another(cluster):
    """KubeRay submits the job to the new head again, and the run goes on from its checkpoint."""
    gone, new = ray_job("Running", "RUNNING", 3), ray_job("Running", "RUNNING", 2)
    cluster.log("head-2", "job-2", OTHER)
    cluster.states(gone, gone, gone, new)
    followed = Followed(cluster, ray_job("Complete", "SUCCEEDED", 2), whole=OTHER)
    assert followed.to_end() == 0
    assert followed.shown == OTHER
    assert followed.notices[1:3] == [
        'the log in pod head-3 cannot be read now (Error from server (NotFound): pods "head-3" not found); trying again',
        "the log in pod head-2 can be read again",
    ]


def test_a_job_that_is_deleted_meanwhile_is_one_line(cluster):
    cluster.states(RUNNING, None)
    with pytest.raises(RunFailed) as caught:
        Followed(cluster).to_end()
    assert holds(str(caught.value), "RayJob x no longer exists, because it was deleted; the same command")


def test_kubernetes_that_does_not_answer_is_asked_again_and_both_is_said_once(cluster):
    cluster.states(RUNNING, *[REFUSED] * 3, RUNNING, DONE)
    followed = Followed(cluster)
    assert followed.to_end() == 0
    assert followed.shown == LOG
    lost, back = followed.notices[1:3]
    assert holds(lost, f"Kubernetes does not respond ({REFUSED.rstrip('.')}); trying again for up to 600 s")
    assert back == "Kubernetes answers again"


def test_kubernetes_that_stays_away_ends_the_wait(cluster, monkeypatch):
    monkeypatch.setattr(follow, "LOST_SECONDS", 0.2)
    cluster.states(RUNNING, REFUSED)
    followed = Followed(cluster)
    with pytest.raises(Lost) as caught:
        followed.to_end()
    assert holds(
        str(caught.value), "Kubernetes has not responded for … refused … the same command attaches to it again"
    )


def test_kubernetes_that_never_answered_is_a_wrong_request(cluster):
    cluster.states(REFUSED)
    with pytest.raises(RequestError) as caught:
        Followed(cluster).to_end()
    assert holds(str(caught.value), "kubectl cannot reach a cluster … refused")


def test_a_document_that_kuberay_refuses_is_a_wrong_request(cluster):
    cluster.states(ray_job(""), ray_job("ValidationFailed", message="The RayJob spec is invalid: x\ny"))
    with pytest.raises(RequestError) as caught:
        Followed(cluster).to_end()
    assert holds(str(caught.value), "KubeRay rejects RayJob x (The RayJob spec is invalid: x); install KubeRay 1.7")


def test_a_log_whose_end_cannot_be_read_does_not_hold_up_the_result(cluster):
    cluster.unreadable_end('Error from server (NotFound): pods "head-1" not found')
    cluster.states(RUNNING)
    followed = Followed(cluster, failed(1))
    assert followed.to_end() == 1
    assert followed.notices[-2:] == [
        'x: the end of its log cannot be read (Error from server (NotFound): pods "head-1" not found)',
        "x: has failed with exit code 1",
    ]


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_leaves_the_job_running_and_twice_stops_it(cluster, monkeypatch, again):
    monkeypatch.setattr(follow, "pressed_again", lambda name: again)
    cluster.states(RUNNING)
    cluster.when_stopped(ray_job("Complete", "STOPPED"))
    followed = Followed(cluster)
    pressed: list[str] = []

    def show(text: str) -> None:
        followed.parts.append(text)
        if not pressed:
            pressed.append("once")
            raise KeyboardInterrupt

    assert follow.follow_to_end("x", [], followed.notices.append, ShownLog(show)) == 130
    stops = [call for call in cluster.calls if "ray job stop" in call]
    if again:
        assert stops == ["exec --request-timeout=30s head-1 --container ray-head -- ray job stop --no-wait job-1"]
        assert "was asked to stop" in followed.notices[-2]
        assert followed.notices[-1] == "x: has been stopped"
    else:
        assert stops == []
        assert followed.notices[-1] == "\nx: is still running; the same command attaches to it again"
