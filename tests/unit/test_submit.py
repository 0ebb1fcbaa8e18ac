"""`raysft submit`, `follow`, `status` and `stop` of jobs, against a dashboard of the tests' own."""

from __future__ import annotations

import io
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from raysft import __version__
from raysft.cli import main
from raysft.config import load
from raysft.config.verb import verb_of
from raysft.submit import follow, kubernetes, submission
from raysft.submit.jobs_internals import Jobs
from raysft.submit.request import job_request, relative_paths
from raysft.submit.shown_log import STOPPED_WITH
from tests.dashboards import FAILED, RUNNING, STOPPED, SUCCEEDED, Dashboard, Job, Tail, dashboard, forget_clusters
from tests.messages import holds
from tests.servers import Answer, http, serving

CONFIG = """
run: {storage: /shared/runs}
model: {path: org/model}
data:
  train: [{name: a, path: /shared/a.jsonl}]
  holdout: 0.1
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A home without a token, an environment without Ray's settings, and short waits."""
    forget_clusters(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    for module, name in ((follow, "FIRST_PAUSE"), (follow, "LONGEST_PAUSE"), (submission, "POLL_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)
    Path("toy.yaml").write_text(CONFIG)


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; gives its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


def submit(run: Callable[..., tuple[int, str, str]], url: str, *more: str) -> str:
    """Submit and give the output."""
    code, out, err = run("submit", "toy.yaml", "--to", url, "--no-follow", *more)
    assert (code, err) == (0, "")
    return out


def refused(run: Callable[..., tuple[int, str, str]], *arguments: str) -> str:
    """The one line of a refusal."""
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("raysft: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("raysft: error: ").rstrip("\n")


def test_a_job_is_a_command_and_the_resolved_config_and_nothing_else(run):
    with dashboard() as server:
        out = submit(run, server.url, "train.epochs=3")
        ((name, job),) = server.jobs.items()
        ((_, package),) = server.packages.items()
    assert re.fullmatch(r"raysft-toy-[0-9a-f]{8}-1", name)
    assert job.entrypoint == "exec raysft run config.yaml"
    assert job.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "290"}
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert [Path(file).name for file in archive.namelist() if not file.endswith("/")] == ["config.yaml"]
        Path("sent.yaml").write_bytes(archive.read("config.yaml"))
    sent = load("sent.yaml")
    assert sent == load("toy.yaml", ["train.epochs=3"])
    assert (sent.train.epochs, sent.run.name) == (3, "toy")
    assert job.about["run_directory"] == "/shared/runs/toy"
    assert job.about["raysft_version"] == __version__
    assert job.about["config_hash"] == name.split("-")[2]
    assert f"{name}: submitted to {server.url} (run directory /shared/runs/toy)\n" in out
    assert out.endswith(f"follow it: raysft follow {name} --to {server.url}\n")


def test_the_commit_of_the_configs_repository_goes_with_the_job(run):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with dashboard() as server:
        submit(run, server.url)
        (job,) = server.jobs.values()
    assert job.about["git_commit"] == commit
    assert len(commit) == 40


def test_the_same_command_attaches_says_done_or_submits_the_next(run):
    with dashboard() as server:
        submit(run, server.url)
        (first,) = server.jobs
        assert holds(submit(run, server.url).splitlines()[0], f"{first}: is already running; nothing was submitted")
        for status, code, ending in ((FAILED, 1, "failed with exit code 1"), (STOPPED, None, "been stopped")):
            last = list(server.jobs)[-1]
            server.jobs[last].status, server.jobs[last].exit_code = status, code
            assert f", as {last} has {ending}\n" in submit(run, server.url)
        assert [name.rpartition("-")[2] for name in server.jobs] == ["1", "2", "3"]
        assert len({name.rpartition("-")[0] for name in server.jobs}) == 1
        last = list(server.jobs)[-1]
        server.jobs[last].status = SUCCEEDED
        assert holds(submit(run, server.url).rstrip("\n"), f"{last}: is done … another run.name starts a new run")
        assert len(server.jobs) == 3
        submit(run, server.url, "run.name=other")
        assert len(server.jobs) == 4


def test_a_cluster_that_has_just_started_is_given_time_to_take_jobs(run, monkeypatch):
    with dashboard() as server:
        server.silent_submissions = 3
        assert ": submitted to " in submit(run, server.url)
        assert len(server.jobs) == 1
        monkeypatch.setattr(submission, "ANSWER_SECONDS", 0.1)
        server.silent_submissions = 1000
        code, out, err = run("submit", "toy.yaml", "--to", server.url, "run.name=other")
    assert (code, out) == (1, "")
    assert holds(
        err.rstrip("\n"), f"raysft: failed: {server.url} does not respond (500, No available agent … same command"
    )


def test_a_number_that_another_process_takes_meanwhile_is_that_jobs(run, monkeypatch):
    with dashboard() as server:
        original = Jobs.submit

        def submit_late(self: Jobs, job: str, *arguments: Any) -> None:
            server.jobs.setdefault(job, Job("", status=RUNNING))
            original(self, job, *arguments)

        monkeypatch.setattr(Jobs, "submit", submit_late)
        assert "is already running; nothing was submitted" in submit(run, server.url)
        assert len(server.jobs) == 1


def test_following_ends_as_the_job_does(run):
    with dashboard() as server:
        name = f"{job_request(load('toy.yaml')).prefix}1"
        server.jobs[name] = Job("step 1\nraysft: error: x\n", [Tail(7)], end=FAILED, exit_code=2)
        code, out, err = run("submit", "toy.yaml", "--to", server.url, "--follow")
    assert code == 2
    assert out.splitlines() == [
        f"{name}: is already running; nothing was submitted",
        "step 1",
        "raysft: error: x",
        f"{name}: has failed with exit code 2",
    ]
    assert err == ""


def test_a_job_that_has_itself_stopped_ends_with_the_exit_code_that_it_names(run):
    last = STOPPED_WITH.format(code=2)
    with dashboard() as server:
        server.jobs["j"] = Job(f"raysft: error: x\n{last}\n", status=STOPPED, exit_code=None)
        code, out, _ = run("follow", "j", "--to", server.url)
    assert (code, out) == (2, f"raysft: error: x\n{last}\nj: has ended with exit code 2\n")


def test_rays_own_reason_is_shown_for_a_job_that_could_not_start(run):
    message = "Job failed to start within 900 seconds.\nMore"
    with dashboard() as server:
        server.jobs["j"] = Job("", status=FAILED, exit_code=None, message=message)
        code, out, _ = run("follow", "j", "--to", server.url)
    assert (code, out) == (1, "j: has failed with exit code 1 (Job failed to start within 900 seconds)\n")


@pytest.mark.parametrize(
    ("overrides", "verb"),
    [
        ([], "run"),
        (["generate.model=org/other"], "generate"),
        (["evaluate.model=org/other"], "evaluate"),
        (["tune.space={train.learning_rate: [0.1, 0.2]}"], "tune"),
    ],
)
def test_the_verb_follows_from_the_config(run, overrides, verb):
    assert verb_of(load("toy.yaml", overrides)) == verb
    with dashboard() as server:
        submit(run, server.url, *overrides)
        (job,) = server.jobs.values()
    assert job.entrypoint == f"exec raysft {verb} config.yaml"


OTHERS = ("evaluate", "generate")
"""Verbs with a model of their own."""


def test_a_job_does_one_of_two_things_that_are_asked_for(run):
    with dashboard() as server:
        line = refused(run, "submit", "toy.yaml", "--to", server.url, "evaluate.model=o/a", "generate.model=o/b")
        sweep = "tune.space={train.learning_rate: [0.1, 0.2]}"
        lines = [refused(run, "submit", "toy.yaml", "--to", server.url, sweep, f"{verb}.model=o/a") for verb in OTHERS]
        assert server.requests == []
    assert "evaluate.model=o/a and generate.model=o/b are both set; set one to null" in line
    for verb, told in zip(OTHERS, lines, strict=True):
        assert "raysft tune " in told
        assert f"remove {verb}.model, or use raysft {verb}" in told


def test_changed_settings_are_allowed_to_a_run_alone(run):
    with dashboard() as server:
        submit(run, server.url, "--allow-changed")
        (job,) = server.jobs.values()
        line = refused(run, "submit", "toy.yaml", "--to", server.url, "--allow-changed", "generate.model=org/other")
    assert job.entrypoint == "exec raysft run config.yaml --allow-changed"
    assert holds(line, "--allow-changed: raysft generate does not support this option; remove it")


def test_what_the_verb_refuses_is_refused_before_anything_is_asked(run):
    with dashboard() as server:
        line = refused(run, "submit", "toy.yaml", "--to", server.url, "stage=pt", "generate.model=org/x")
        assert server.requests == []
    assert "stage=pt" in line


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["run.storage=runs"], "run.storage=runs: "),
        (["run.storage=~/runs"], "run.storage=~/runs: "),
        (["data.cache=cache"], "data.cache=cache: "),
        (["data.train.0.path=[/shared/a.jsonl, b.jsonl]"], "data.train.0.path=b.jsonl: "),
        (["data.eval=[{name: e, path: e.jsonl}]"], "data.eval.0.path=e.jsonl: "),
        (["data.registry=dataset_info.json"], "data.registry=dataset_info.json: "),
        (["data.media_dir=pictures"], "data.media_dir=pictures: "),
        (["model.path=base"], "model.path=base: "),
        (["model.path=m.gguf"], "model.path=m.gguf: "),
        (["model.path=./org/model"], "model.path=./org/model: "),
        (["model.adapters=[a/b/c]"], "model.adapters.0=a/b/c: "),
        (["model.chat_template=x.jinja"], "model.chat_template=x.jinja: "),
        (["train.deepspeed=ds.json"], "train.deepspeed=ds.json: "),
        (["generate.metrics=[./mine.py]"], "generate.metrics.0=./mine.py: "),
    ],
)
def test_paths_that_depend_on_this_machine_are_refused_with_what_to_do(run, overrides, key):
    Path("base").mkdir()
    line = refused(run, "submit", "toy.yaml", "--to", "http://127.0.0.1:1", *overrides)
    assert line.startswith(key)
    assert line.endswith("; use an absolute path that all nodes of the cluster can access, or a URI")


def test_paths_that_mean_the_same_everywhere_are_not(run):
    overrides = [
        "run.storage=s3://bucket/runs",
        "data.cache=file:///shared/cache",
        "data.train.0.path=[hf://datasets/a/b, 'package:chatterbot_corpus/data/*.yml', /x/y.jsonl]",
        "model.path=model",
        "model.adapters=[org/adapter, /x/adapter]",
        "model.chat_template=chatml",
        "generate.metrics=[similarity, org/metric]",
    ]
    assert list(relative_paths(load("toy.yaml", overrides))) == []


def test_the_address_of_a_cluster_in_the_config_is_refused(run):
    line = refused(run, "submit", "toy.yaml", "--to", "http://127.0.0.1:1", "scaling.address=local")
    assert holds(line, "scaling.address=local: … remove scaling.address")


def test_a_run_directory_that_a_job_with_another_config_uses_is_taken(run):
    with dashboard() as server:
        submit(run, server.url)
        (name,) = server.jobs
        line = refused(run, "submit", "toy.yaml", "--to", server.url, "train.epochs=9")
        assert holds(
            line, f"run.name=toy: {name} is running with another config in /shared/runs/toy; … another run.name"
        )
        server.jobs[name].status = FAILED
        submit(run, server.url, "train.epochs=9")  # the run itself knows whether it can go on with it


# The address


def saying(words: bytes) -> Answer:
    """A server that answers any request so, and hangs up."""

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(words)

    return answer


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("head:8265", "--to head:8265: is not a dashboard URL; use http://HOST:8265, or kubernetes"),
        ("ray://head:10001", "--to ray://head:10001: the address of a Ray Client … http://HOST:8265"),
        ("s3://bucket", "--to s3://bucket: is not a dashboard URL"),
        ("http://", "--to http://: is not a URL with a host"),
        ("http://a..b:8265", "--to http://a..b:8265: is not a URL with a host"),
        (f"http://{'a' * 64}:8265", "--to http://aaa … aaa:8265: is not a URL with a host"),
        ("http://head:port", "--to http://head:port: is not a URL ("),
        ("http://head:99999", "--to http://head:99999: is not a URL ("),
        ("http://me:word@head:8265", "--to http://…@head: credentials … RAY_AUTH_TOKEN"),
        ("http://head:8265?a=b", "--to http://head:8265?a=b: has a query"),
        (
            "http://127.0.0.1:1",
            "--to http://127.0.0.1:1: no Ray cluster answers (Connection refused); check the address",
        ),
        ("http://none.invalid:8265", "--to http://none.invalid:8265: no Ray cluster answers ("),
    ],
)
def test_an_address_that_is_none_is_one_line(run, address, parts):
    for command in (["submit", "toy.yaml"], ["follow", "j"], ["status", "j"], ["stop", "j"]):
        line = refused(run, *command, "--to", address)
        assert holds(line, parts)
        assert "word" not in line


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        (http("404 Not Found"), "an HTTP server answers (404), but it is not the dashboard of a Ray cluster"),
        (http("200 OK", b"<html>"), "an HTTP server answers (200), but it is not the dashboard of a Ray cluster"),
        (http("200 OK", b"[]"), "an HTTP server answers (200), but it is not the dashboard of a Ray cluster"),
        (http("502 Bad Gateway"), "no Ray cluster answers (502, Bad Gateway)"),
        (
            http("400 Bad Request", b"Client sent an HTTP request to an HTTPS server."),
            "the server speaks HTTPS; use https://",
        ),
        (
            http("400 Bad Request", b"The plain HTTP request was sent to HTTPS port"),
            "the server speaks HTTPS; use https://",
        ),
        (
            saying(b"\x15\x03\x03\x00\x02\x02\x50"),
            "the server speaks HTTPS; use https://",
        ),
        # What the server of a cluster's own nodes says first, which speaks HTTP/2.
        (
            saying(b"\x00\x00\x18\x04\x00\x00\x00\x00\x00"),
            "is not an HTTP server; … 10001 … 6379",
        ),
        (lambda connection: None, "is not an HTTP server; … 10001 … 6379"),
    ],
)
def test_a_server_that_is_no_dashboard_is_named(run, answer, parts):
    with serving(answer) as port:
        line = refused(run, "status", "j", "--to", f"http://127.0.0.1:{port}")
    assert holds(line, f"--to http://127.0.0.1:{port}: … {parts}")


def test_a_server_that_never_answers_is_given_up(run, monkeypatch):
    monkeypatch.setattr("raysft.submit.jobs_internals.ANSWER_SECONDS", 0.2)
    with serving(lambda connection: time.sleep(2)) as port:
        line = refused(run, "status", "j", "--to", f"http://127.0.0.1:{port}")
    assert holds(line, "--to … no Ray cluster answers ( … timed out … check the address")


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context with a certificate that nobody else has signed, and the certificate."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "t")])
    today = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(today - timedelta(1)).not_valid_after(today + timedelta(1))
    signed = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    file = folder / "certificate.pem"
    file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file, folder / "key.pem")
    return context, file


def test_http_and_https_are_not_mixed_up_and_certificates_are_verified(run, tmp_path, monkeypatch):
    context, file = certificate(tmp_path)
    with dashboard() as server:
        secure = server.url.replace("http:", "https:")
        assert holds(refused(run, "status", "j", "--to", secure), f"--to {secure}: … use {server.url}")
    with dashboard(context) as server:
        server.jobs["j"] = Job("line 1\nline 2\n", [Tail(7)])
        plain = server.url.replace("https:", "http:")
        assert refused(run, "status", "j", "--to", plain).startswith(f"--to {plain}: ")
        line = refused(run, "status", "j", "--to", server.url)
        assert holds(line, f"--to {server.url}: the server's certificate cannot be verified ( … SSL_CERT_FILE")
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        code, out, _ = run("follow", "j", "--to", server.url)  # both requests and web sockets
        assert (code, out) == (0, "line 1\nline 2\nj: has succeeded\n")
        assert any(request.endswith("/logs/tail") for request in server.requests)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
        assert holds(refused(run, "status", "j", "--to", server.url), "SSL_CERT_FILE= … none.pem: no such file")


def test_the_address_that_is_asked_for_goes_before_rays_environment(run, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with dashboard() as server:
        submit(run, server.url)
        assert server.jobs


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"ray_version": "2.40.0"}, "the cluster runs Ray 2.40.0, but raysft … needs 2. … use an image"),
        ({"ray_version": ""}, "the cluster runs Ray of an unknown version, but raysft"),
        ({"python_version": "3.9.21"}, "the cluster runs Python 3.9.21, but raysft … needs … use an image"),
    ],
)
def test_a_cluster_with_other_versions_is_refused(run, settings, parts):
    with dashboard(**settings) as server:
        assert holds(refused(run, "submit", "toy.yaml", "--to", server.url), f"--to {server.url}: {parts}")
        assert not server.jobs


def test_another_python_that_raysft_supports_is_fine_as_nothing_is_pickled(run):
    for version in ("3.11.2", "3.12.7"):
        with dashboard(python_version=version) as server:
            submit(run, server.url)


# The token


def put_token(token: str) -> None:
    folder = Path.home() / ".ray"
    folder.mkdir()
    (folder / "auth_token").write_text(f"{token}\n")


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"])
def test_a_token_that_lies_here_is_sent_once_it_is_asked_for(run, monkeypatch, tmp_path, place):
    if place == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(place, "secret")
    elif place == "RAY_AUTH_TOKEN_PATH":
        (tmp_path / "token").write_text("secret")
        monkeypatch.setenv(place, str(tmp_path / "token"))
    else:
        put_token("secret")
    with dashboard(token="secret") as server:
        server.jobs["j"] = Job("one\ntwo\n", [Tail(4)])
        assert run("follow", "j", "--to", server.url)[:2] == (0, "one\ntwo\nj: has succeeded\n")
        assert server.requests[:2] == ["GET /api/version", "GET /api/version *"]
        assert all(request.endswith(" *") for request in server.requests[1:])
        assert "GET /api/jobs/j/logs/tail *" in server.requests
    with dashboard() as server:  # which asks for none
        submit(run, server.url)
        assert not [request for request in server.requests if request.endswith("*")]


def test_ray_auth_mode_sends_the_token_at_once_or_never(run, monkeypatch):
    put_token("secret")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with dashboard(token="secret") as server:
        submit(run, server.url)
        assert all(request.endswith(" *") for request in server.requests)
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        line = refused(run, "submit", "toy.yaml", "--to", server.url)
        assert not server.requests[-1].endswith("*")
    assert holds(line, f"--to {server.url}: the cluster requires an access token … RAY_AUTH_MODE=disabled … unset it")


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        (
            {},
            "--to URL: the cluster requires an access token, but none is set; set RAY_AUTH_TOKEN … ~/.ray/auth_token",
        ),
        ({"RAY_AUTH_TOKEN": "wrong"}, "--to URL: the cluster rejects the access token of RAY_AUTH_TOKEN ("),
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE=token, but no token is set; set RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN": "sec\nret"}, "RAY_AUTH_TOKEN: is not a token"),
        ({"RAY_AUTH_TOKEN_PATH": "/none"}, "RAY_AUTH_TOKEN_PATH=/none: cannot be read (No such file or directory)"),
    ],
)
def test_a_wrong_token_or_none_is_one_line_that_does_not_show_it(run, monkeypatch, environment, parts):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with dashboard(token="secret") as server:
        line = refused(run, "submit", "toy.yaml", "--to", server.url)
        assert holds(line, parts.replace("URL", server.url))
        assert not {"secret", "wrong", "sec", "ret"} & set(re.findall(r"\w+", line))


# Kubernetes


def kubernetes_config() -> None:
    """Make the config one that pods can run."""
    Path("toy.yaml").write_text(CONFIG.replace("/shared", "s3://bucket") + "cluster: {image: example.com/raysft:1}\n")


def test_documents_for_kubernetes_are_written_and_nothing_is_asked(run, monkeypatch):
    kubernetes_config()
    monkeypatch.setenv("PATH", "")
    expected = kubernetes.render(load("toy.yaml", ["train.epochs=3"]))
    arguments = ("submit", "toy.yaml", "--to", "kubernetes", "--render")
    assert run(*arguments, "-", "train.epochs=3") == (0, expected, "")
    assert run(*arguments, "job.yaml", "train.epochs=3") == (0, "", "")
    assert Path("job.yaml").read_text() == expected
    assert holds(refused(run, *arguments, "none/job.yaml"), "--render none/job.yaml: cannot be written (No such file")
    assert holds(refused(run, "submit", "toy.yaml", "--to", "kubernetes"), "kubectl is not installed")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--to", "http://127.0.0.1:1", "--render", "-"], "--render -: … use --to kubernetes"),
        (["--to", "kubernetes", "--follow", "--render", "-"], "--render -: only writes manifests … --follow"),
        (["--to", "kubernetes", "--allow-changed"], "--allow-changed: --to kubernetes does not support this option"),
    ],
)
def test_what_kubernetes_does_not_do_is_refused(run, arguments, parts):
    assert holds(refused(run, "submit", "toy.yaml", *arguments), parts)


def test_a_job_on_kubernetes_is_named(run, monkeypatch):
    kubernetes_config()
    monkeypatch.setattr(kubernetes, "submit", lambda config, notify: f"raysft-{config.run.name}-1")
    assert run("submit", "toy.yaml", "--to", "kubernetes") == (0, "check on it: kubectl get rayjob raysft-toy-1\n", "")


# Status and stop


def test_the_status_of_a_job_says_how_it_is_and_what_to_do_next(run):
    with dashboard() as server:
        submit(run, server.url)
        (name,) = server.jobs
        code, out, _ = run("status", name, "--to", server.url)
        assert code == 0
        lines = out.splitlines()
        assert lines[0] == f"{name}: is running"
        assert "run directory: /shared/runs/toy" in lines
        assert "last line: it runs" in lines
        assert lines[-1] == f"next: raysft follow {name} --to {server.url}, or raysft stop {name} --to {server.url}"
        server.jobs[name].status, server.jobs[name].exit_code = FAILED, 75
        assert (
            "has stopped early (exit code 75); the same command resumes it"
            in run("status", name, "--to", server.url)[1]
        )
        server.jobs[name].exit_code = 1
        lines = run("status", name, "--to", server.url)[1].splitlines()
    assert lines[0] == f"{name}: has failed with exit code 1"
    assert lines[-1].startswith("next: run the command that submitted it again")


def test_stop_waits_until_the_job_has_ended_and_says_how(run):
    with dashboard() as server:
        submit(run, server.url)
        (name,) = server.jobs
        server.silent_answers = 0
        code, out, err = run("stop", name, "--to", server.url)
        assert (code, err) == (0, "")
        assert holds(out.splitlines()[0], f"{name}: was asked to stop")
        assert out.splitlines()[1] == f"{name}: has been stopped; its last line: stopped: checkpoint after step 7"
        assert run("stop", name, "--to", server.url)[:2] == (0, f"{name}: has been stopped before\n")


def test_a_page_in_place_of_an_answer_is_asked_again(run):
    with dashboard() as server:
        server.jobs["j"] = Job("step 1\n", [Tail(7, "close")])
        for command in ("status", "follow", "stop"):
            server.login_pages = 2
            code, _, err = run(command, "j", "--to", server.url)
            assert (code, server.login_pages, err.count("\n")) == (0, 0, 2 if command == "follow" else 0)


def test_a_head_that_starts_anew_while_a_job_stops_is_told(run, monkeypatch):
    with dashboard() as server:
        submit(run, server.url)
        (name,) = server.jobs
        monkeypatch.setattr(Jobs, "stop", lambda self, job: setattr(server, "forgotten", True))
        code, _, err = run("stop", name, "--to", server.url)
    assert code == 1
    assert holds(err.rstrip("\n"), f"raysft: failed: {server.url} no longer knows {name} … newest checkpoint")


def test_a_job_that_does_not_stop_is_not_waited_for_forever(run, monkeypatch):
    monkeypatch.setattr(submission, "STOPPED_SECONDS", 0.2)
    monkeypatch.setattr(Jobs, "stop", lambda self, job: True)
    with dashboard() as server:
        submit(run, server.url)
        (name,) = server.jobs
        code, _, err = run("stop", name, "--to", server.url)
    assert code == 1
    assert holds(
        err.rstrip("\n"), f"raysft: failed: {name}: is running … after it was asked to stop; … raysft stop {name}"
    )


@pytest.mark.parametrize("command", ["follow", "status", "stop"])
def test_an_unknown_job_is_one_line_with_those_that_are_known(run, command):
    with dashboard() as server:
        assert holds(
            refused(run, command, "a/b c", "--to", server.url), f"a/b c: {server.url} has no such job; it knows no job"
        )
        server.jobs["known-1"] = Job("")
        assert holds(
            refused(run, command, "j", "--to", server.url), f"j: {server.url} has no such job; it knows known-1"
        )


@pytest.mark.parametrize("command", ["follow", "status", "stop"])
@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_names_no_job_in_a_url_is_one_line(run, command, name):
    assert holds(refused(run, command, name, "--to", "http://127.0.0.1:1"), f"{name!r} is not a job name; use")


def test_a_job_without_its_cluster_is_told_to_name_it(run):
    assert holds(refused(run, "status", "raysft-toy-12345678-1"), "raysft-toy-12345678-1: … --to http://HOST:8265")


# Ctrl-C


def interrupted(server: Dashboard, times: int) -> tuple[int, str]:
    """Follow a job in a process of its own, and press Ctrl-C there, again once it asks for that."""
    command = ["env", "--default-signal=INT", sys.executable, "-m", "raysft", "follow", "j", "--to", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        shown = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        for line in process.stdout:
            shown += line
            if "press Ctrl-C again" in line and times > 1:
                process.send_signal(signal.SIGINT)
        return process.wait(30), shown


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back():
    with dashboard() as server:
        server.jobs["j"] = Job("step 1\n")
        code, shown = interrupted(server, 1)
        assert server.jobs["j"].status == RUNNING
    assert code == 130
    lines = [line for line in shown.splitlines() if line]
    assert lines[0] == "step 1"
    assert holds(lines[-1], f"j: is still running; come back with: raysft follow j --to {server.url}")
    assert len(lines) == 3


def test_ctrl_c_twice_stops_the_job_and_shows_its_end():
    with dashboard() as server:
        server.jobs["j"] = Job("step 1\n")
        code, shown = interrupted(server, 2)
        assert server.jobs["j"].status == STOPPED
    assert code == 130
    lines = [line for line in shown.splitlines() if line]
    assert [lines[0], *lines[-2:]] == ["step 1", "stopped: checkpoint after step 7", "j: has been stopped"]
    assert lines.count("step 1") == 1
