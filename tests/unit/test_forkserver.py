"""Asking for a fork: what does not answer."""

from __future__ import annotations

import socket
import time

from raysft.cluster import forkserver
from raysft.cluster.forkserver import ADDRESS


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
