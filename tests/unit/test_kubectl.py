"""Jobs are started with kubectl: the real one where it is installed, against servers that answer as clusters do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from raysft.config import Config, load
from raysft.submit.kubernetes import documents, submit
from raysft.submit.kubernetes.names import job_name
from tests import messages
from tests.cluster_examples import ROOT

NEEDS_KUBECTL = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
KINDS = {
    "/api/v1": {"ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"},
    "/apis/policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "/apis/ray.io/v1": {"RayJob": "rayjobs"},
}
"""Kinds of objects that a cluster with KubeRay has, by the path of their group."""
Answer = Callable[[str, str, bytes], tuple[int, Any]]


@pytest.fixture
def config() -> Config:
    volume = "cluster.volume={claim: raysft, size: 10Gi}"
    given = ("run.storage=/mnt/raysft/runs", "cluster.image=raysft:1", "cluster.workers={gpus: 1}", volume)
    return load(ROOT / "configs" / "lora.yaml", [*given, "cluster.namespace=team"])


def status(code: int, reason: str, message: str) -> tuple[int, Any]:
    return code, {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": message,
    }


def discovery(path: str, kinds: dict[str, dict[str, str]]) -> Any:
    """What a cluster says of its kinds of objects; None if the path asks for something else."""
    groups = [one.removeprefix("/apis/") for one in kinds if one.startswith("/apis/")]
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": one, "version": one.rpartition("/")[2]} for one in groups]
        named = [
            {"name": one["groupVersion"].partition("/")[0], "versions": [one], "preferredVersion": one}
            for one in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
    if path in kinds:
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get", "patch"]}
            for kind, plural in kinds[path].items()
        ]
        group = path.removeprefix("/apis/").removeprefix("/api/")
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}
    if path == "/openapi/v3":
        return {"paths": {one[1:]: {"serverRelativeURL": f"/openapi/v3{one}"} for one in kinds}}
    group = path.removeprefix("/openapi/v3")
    return openapi(group, kinds[group]) if group in kinds else None


def openapi(group: str, kinds: dict[str, str]) -> Any:
    """What a cluster says of a group's requests: that it checks the fields of an object itself."""
    name, _, version = group.removeprefix("/apis/").removeprefix("/api/").rpartition("/")
    patches = {
        f"{group}/namespaces/{{namespace}}/{plural}/{{name}}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": name, "version": version, "kind": kind},
            }
        }
        for kind, plural in kinds.items()
    }
    return {"openapi": "3.0.0", "info": {"title": "cluster", "version": "1"}, "paths": patches}


class Cluster:
    """A server that knows kinds of objects and answers other requests with a function of method, path and content."""

    def __init__(self, answer: Answer, kinds: dict[str, dict[str, str]] = KINDS) -> None:
        self.applied: list[Any] = []
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply()

            def do_PATCH(self) -> None:
                self.reply()

            def reply(self) -> None:
                path, query = self.path.partition("?")[::2]
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = discovery(path, kinds)
                code, body = (200, found) if found else answer(self.command, path, content)
                if self.command == "PATCH" and self.headers["Content-Type"] == "application/apply-patch+yaml":
                    assert "fieldValidation=Strict" in query
                    cluster.applied.append(yaml.safe_load(content))
                sent = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Cluster:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def context(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Make a server the current context of kubectl."""

    def choose(address: str) -> None:
        named = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": address}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {"token": "t"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(named))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("HOME", str(tmp_path))  # kubectl keeps what it learns of a cluster there

    return choose


def absent(method: str, path: str, content: bytes) -> tuple[int, Any]:
    """Answer as a cluster that has no such object yet and accepts what is applied."""
    if method == "PATCH":
        return 201, yaml.safe_load(content)
    return status(404, "NotFound", f"{path} not found")


@NEEDS_KUBECTL
def test_a_job_is_applied_with_all_that_belongs_to_it(config, context):
    lines: list[str] = []
    with Cluster(absent) as cluster:
        context(cluster.address)
        name = submit(config, lines.append)
    assert name == job_name(config)
    assert cluster.applied == documents(config)
    assert [line for line in lines if name in line and "rayjob" in line]


@NEEDS_KUBECTL
@pytest.mark.parametrize("at", ["Running", ""])
def test_a_job_that_is_there_is_found_and_not_applied_again(config, context, at):
    def present(method: str, path: str, content: bytes) -> tuple[int, Any]:
        if not path.endswith(f"/namespaces/team/rayjobs/{job_name(config)}"):
            return absent(method, path, content)
        return 200, {**documents(config)[-1], "status": {"jobDeploymentStatus": at}}

    lines: list[str] = []
    with Cluster(present) as cluster:
        context(cluster.address)
        assert submit(config, lines.append) == job_name(config)
    assert cluster.applied == []
    assert len(lines) == 1
    assert (at or "new") in lines[0]


@NEEDS_KUBECTL
@pytest.mark.parametrize("at", ["Complete", "Failed"])
def test_a_job_that_has_ended_is_not_taken_for_a_running_one(config, context, at):
    def present(method: str, path: str, content: bytes) -> tuple[int, Any]:
        return 200, {**documents(config)[-1], "status": {"jobDeploymentStatus": at}}

    with Cluster(present) as cluster:
        context(cluster.address)
        message = messages.refusal(submit, config, print)
    assert messages.holds(message, f"RayJob {job_name(config)} has ended ({at}) … kubectl delete rayjob")
    assert " --namespace team" in message


@NEEDS_KUBECTL
def test_a_right_that_is_missing_is_named(config, context):
    reason = 'rayjobs.ray.io "x" is forbidden: User "me" cannot get resource "rayjobs" in the namespace "team"'
    with Cluster(lambda *request: status(403, "Forbidden", reason)) as cluster:
        context(cluster.address)
        message = messages.refusal(submit, config, print)
    assert messages.holds(
        message, 'kubectl is not allowed to do this … cannot get resource "rayjobs" … cluster.namespace'
    )


@NEEDS_KUBECTL
def test_a_cluster_without_kuberay_is_recognized(config, context):
    without = {path: kinds for path, kinds in KINDS.items() if "ray.io" not in path}
    with Cluster(absent, without) as cluster:
        context(cluster.address)
        message = messages.refusal(submit, config, print)
    assert cluster.applied == []
    assert messages.holds(message, "the cluster does not know … rayjob … KubeRay's operator 1.7")


@NEEDS_KUBECTL
def test_a_cluster_that_is_away_is_recognized(config, context):
    with Cluster(absent) as cluster:
        pass
    context(cluster.address)
    assert messages.holds(
        messages.refusal(submit, config, print), "kubectl cannot reach a cluster … refused … use-context"
    )


@NEEDS_KUBECTL
def test_no_context_is_recognized(config, context, tmp_path):
    context("")
    (tmp_path / "kubeconfig").write_text("")
    assert messages.holds(messages.refusal(submit, config, print), "kubectl cannot reach a cluster … use-context")


def test_kubectl_that_is_missing_is_named(config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert messages.holds(messages.refusal(submit, config, print), "kubectl is not installed … --render FILE")


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Put a program in Python in the place of kubectl."""

    def put(program: str) -> None:
        path: Path = tmp_path / "kubectl"
        path.write_text(f"#!{sys.executable}\nimport sys, time\n{program}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return put


def test_another_failure_is_repeated_in_one_line(config, stand_in):
    stand_in("sys.exit('a warning\\nerror: quota exceeded for pods')")
    assert messages.holds(
        messages.refusal(submit, config, print), "kubectl get failed (error: quota exceeded for pods)"
    )


def test_kubectl_without_an_answer_is_given_up(config, stand_in, monkeypatch):
    monkeypatch.setattr("raysft.submit.kubernetes.kubectl.COMMAND_SECONDS", 0.2)
    stand_in("time.sleep(30)")
    assert messages.holds(messages.refusal(submit, config, print), "kubectl get did not respond")
