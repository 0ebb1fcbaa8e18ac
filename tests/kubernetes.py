"""A program in the place of kubectl that answers as kubectl does, for a RayJob whose life a test plays."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = '''#!{python} -IS
import json, os, sys, time
here = {folder!r}

def read(name, default=""):
    try:
        with open(os.path.join(here, name), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return default

def write(name, text):
    with open(os.path.join(here, name + ".new"), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(os.path.join(here, name + ".new"), os.path.join(here, name))

def fail(text):
    sys.stderr.write(text + "\\n")
    sys.exit(1)

def take(name):
    """The next of several answers; the last one stays."""
    answers = json.loads(read(name, "[]"))
    if len(answers) > 1:
        write(name, json.dumps(answers[1:]))
    return answers[0] if answers else None

verb, words = sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("--request-timeout=")]
with open(os.path.join(here, "calls"), "a", encoding="utf-8") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if verb == "get":
    if words[-1].startswith("jsonpath"):
        sys.exit(0)  # --ignore-not-found
    answer = take("states")
    if isinstance(answer, str):
        fail(answer)
    if answer is not None:
        print(json.dumps(answer, indent=4))
elif verb == "apply":
    sys.stdin.read()
    print("rayjob.ray.io/x serverside-applied")
elif verb == "exec":
    pod, command = words[0], words[words.index("--") + 1 :]
    if command[0] == "ray":
        print("Attempting to stop job")
        write("states", read("stopped"))
        sys.exit(0)
    name = "log " + pod + " " + os.path.basename(command[-1]).removeprefix("job-driver-").removesuffix(".log")
    if not os.path.exists(os.path.join(here, name)):
        fail(f'Error from server (NotFound): pods "{{pod}}" not found')
    if command[0] == "cat":
        error = read("cat error")
        if error:
            fail(error)
        sys.stdout.write(read(name))
        sys.exit(0)
    breaks = take("breaks")
    sent = 0
    while True:
        whole = read(name).encode()
        stop = len(whole) if breaks is None else min(breaks[0], len(whole))
        if stop > sent:
            sys.stdout.buffer.write(whole[sent:stop])
            sys.stdout.buffer.flush()
            sent = stop
        if breaks is not None and sent >= breaks[0]:
            if breaks[1] == "hang":
                time.sleep(600)
            if breaks[1]:
                fail(breaks[1])
            sys.exit(0)
        time.sleep(0.02)
'''


class Kubernetes:
    """What kubectl answers, in the files of a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder / "kubernetes"
        self._folder.mkdir()
        program = folder / "bin" / "kubectl"
        program.parent.mkdir()
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(self._folder)))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    def states(self, *states: Any) -> None:
        """Let KubeRay's next answers be these, and then the last one for ever: a document, an error's text, or None."""
        self._write("states", json.dumps(states))

    def when_stopped(self, *states: Any) -> None:
        """What the answers become when `ray job stop` runs in the head."""
        self._write("stopped", json.dumps(states))

    def breaks(self, *breaks: tuple[int, str] | None) -> None:
        """After how many bytes the next connections to a log break, and with which error, or ``hang``; None: never."""
        self._write("breaks", json.dumps(breaks))

    def log(self, pod: str, job: str, text: str) -> None:
        """Let a job in a pod have printed this."""
        self._write(f"log {pod} {job}", text)

    def unreadable_end(self, error: str) -> None:
        """Let the whole log not be readable."""
        self._write("cat error", error)

    @property
    def calls(self) -> list[str]:
        """Arguments of each call."""
        return (self._folder / "calls").read_text().splitlines()

    def _write(self, name: str, text: str) -> None:
        draft = self._folder / f"{name}.draft"
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._folder / name)


def ray_job(deployment: str, job: str = "", number: int = 1, message: str = "", reason: str = "") -> dict[str, Any]:
    """A RayJob as KubeRay 1.7 shows it, in an attempt."""
    status: dict[str, Any] = {"jobDeploymentStatus": deployment, "failed": number - 1, "succeeded": 0}
    if deployment not in ("", "Initializing", "ValidationFailed"):
        status["jobId"] = f"job-{number}"
        status["rayClusterStatus"] = {"head": {"podName": f"head-{number}", "podIP": "10.0.0.7"}, "state": "ready"}
    status |= {"jobStatus": job} if job else {}
    status |= {"message": message} if message else {}
    status |= {"reason": reason} if reason else {}
    kind = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}}
    return {**kind, "spec": {"backoffLimit": 3}, "status": status}


def failed(code: int, *, deployment: str = "Failed", number: int = 1, reason: str = "AppFailed") -> dict[str, Any]:
    """A RayJob whose driver has ended with an exit code, in Ray's words."""
    message = (
        f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\nx"
    )
    found = ray_job(deployment, "FAILED", number, message, reason)
    found["status"]["failed"] = number
    return found
