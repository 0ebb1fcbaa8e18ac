"""Asking for a fork: whom, and what does not respond."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from raysft.cluster import forkserver
from raysft.cluster.forkserver import ADDRESS, COMMAND, CONTEXT


def test_only_the_first_waits_for_a_server_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(forkserver, "ANSWER_SECONDS", 0.5)
    monkeypatch.setenv(ADDRESS, str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()
        started = time.monotonic()
        assert not forkserver._fork(["worker.py"], {})
        first = time.monotonic() - started
        assert not forkserver._fork(["worker.py"], {})
        assert time.monotonic() - started - first < 0.25 < 0.5 <= first


def test_the_server_of_the_driver_that_has_joined_is_asked(tmp_path, monkeypatch):
    """And not that of the driver that has started the cluster."""
    monkeypatch.setenv(ADDRESS, str(tmp_path / "of the other"))

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            forkserver.Request.receive(connection).close()
            connection.sendall(b"+")

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server, ThreadPoolExecutor(1) as executor:
        server.settimeout(10)
        server.bind(str(tmp_path / "socket"))
        server.listen()
        answered = executor.submit(answer, server)
        assert forkserver._fork(["worker.py"], {ADDRESS: str(tmp_path / "socket")})
        answered.result()


@pytest.mark.parametrize(
    ("command", "forks"),
    [(None, True), (sys.executable, True), (COMMAND, True), (f"env {sys.executable}", False)],
)
def test_a_worker_is_a_fork_unless_its_command_is_another(monkeypatch, command, forks):
    """Ray's own way to a fork would import Ray first."""
    asked: list[Any] = []
    monkeypatch.setattr(forkserver, "_fork", lambda worker, variables: asked.append((worker, variables)) or True)
    monkeypatch.setattr(os, "execv", lambda program, arguments: asked.append("Ray"))
    context = json.dumps({"py_executable": command, "env_vars": {ADDRESS: "socket"}})
    forkserver._ask(["worker.py", f"{CONTEXT}{context}"])
    assert asked == ([(["worker.py"], {ADDRESS: "socket"})] if forks else ["Ray"])


def test_a_fork_does_not_take_apart_at_its_end_what_it_began_with():
    """As torch would its operators; what it has made itself, such as a temporary folder, it removes."""
    script = (
        "import weakref\nfrom raysft.cluster import forkserver\nclass Library: pass\n"
        "before, after = Library(), Library()\nweakref.finalize(before, print, 'of the server')\n"
        "forkserver._keep_at_exit()\nweakref.finalize(after, print, 'its own')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "its own\n"
