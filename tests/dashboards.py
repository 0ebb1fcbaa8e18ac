"""The Jobs API of a Ray dashboard that fails as real ones do: connections break, answers are late or wrong, heads start anew."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import web

RUNNING, SUCCEEDED, FAILED, STOPPED = "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"


@dataclass
class Tail:
    """What becomes of one connection to a job's log."""

    characters: int
    """So many are sent from its beginning."""
    end: str = "cut"
    """``cut``: the connection breaks; ``close``: it ends in order, though the job runs; ``hang``: nothing more comes."""


@dataclass
class Job:
    """A job, which ends when all its ``tails`` were used up."""

    log: str = ""
    tails: list[Tail] = field(default_factory=list)
    status: str = RUNNING
    end: str = SUCCEEDED
    exit_code: int | None = 0
    about: dict[str, str] = field(default_factory=dict)
    message: str | None = None
    entrypoint: str = "raysft run config.yaml"
    runtime_env: dict[str, Any] = field(default_factory=dict)


@dataclass
class Dashboard:
    """A dashboard, and what tests change of it while it runs."""

    token: str | None = None
    ray_version: str = ray.__version__
    python_version: str = "3.11.9"
    jobs: dict[str, Job] = field(default_factory=dict)
    silent_answers: int = 0
    """So many of the next questions about a job get the answer 503."""
    login_pages: int = 0
    """So many of the next questions about a job get a page of HTML, as from a proxy at which a login has expired."""
    silent_submissions: int = 0
    """So many of the next submissions are refused as by a head that has just started."""
    forgotten: bool = False
    """Its jobs are unknown, as after a restart of the head."""
    requests: list[str] = field(default_factory=list)
    """Method, path and, with a bearer token, ``*`` of each request."""
    url: str = ""
    packages: dict[str, bytes] = field(default_factory=dict)

    def app(self) -> web.Application:
        """The server's routes."""
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/v0/cluster_metadata", self._metadata)
        app.router.add_get("/api/packages/{protocol}/{name}", self._package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._upload)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{job}", self._details)
        app.router.add_post("/api/jobs/{job}/stop", self._stop)
        app.router.add_get("/api/jobs/{job}/logs", self._logs)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Any) -> web.StreamResponse:
        header = request.headers.get("Authorization", "")
        self.requests.append(f"{request.method} {request.path}{' *' if header else ''}")
        if self.token and not header:
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        if self.token and header != f"Bearer {self.token}":
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"version": "4", "ray_version": self.ray_version, "ray_commit": "", "session_name": ""}
        )

    async def _metadata(self, request: web.Request) -> web.Response:
        return web.json_response({"result": True, "msg": "", "data": {"pythonVersion": self.python_version}})

    async def _package(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if request.path in self.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        self.packages[request.path] = await request.read()
        return web.json_response({})

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response([self._described(name) for name in self.jobs])

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if self.silent_submissions > 0:
            self.silent_submissions -= 1
            return web.Response(status=500, text="No available agent to submit job, please try again later.")
        if name in self.jobs:
            text = (
                f"Traceback (most recent call last):\nValueError: Job with submission_id {name} already exists. Please"
            )
            return web.Response(status=500, text=text)
        self.jobs[name] = Job(
            entrypoint=asked["entrypoint"], about=asked["metadata"], runtime_env=asked["runtime_env"], log="it runs\n"
        )
        return web.json_response({"job_id": name, "submission_id": name})

    def _described(self, name: str) -> dict[str, Any]:
        job = self.jobs[name]
        ended = job.status != RUNNING
        return {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": job.status,
            "entrypoint": job.entrypoint,
            "metadata": job.about,
            "message": job.message,
            "driver_exit_code": job.exit_code if ended else None,
            "start_time": 1_790_000_000_000,
        }

    def _unknown(self, name: str) -> web.Response | None:
        if self.silent_answers > 0:
            self.silent_answers -= 1
            return web.Response(status=503, text="no healthy upstream")
        if self.login_pages > 0:
            self.login_pages -= 1
            return web.Response(text="<html>Log in</html>", content_type="text/html")
        if self.forgotten or name not in self.jobs:
            return web.Response(status=404, text=f"Job {name} does not exist")
        return None

    async def _details(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        return self._unknown(name) or web.json_response(self._described(name))

    async def _stop(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        if unknown := self._unknown(name):
            return unknown
        job = self.jobs[name]
        job.status, job.exit_code, job.log = STOPPED, None, f"{job.log}stopped: checkpoint after step 7\n"
        return web.json_response({"stopped": True})

    async def _logs(self, request: web.Request) -> web.Response:
        name = request.match_info["job"]
        return self._unknown(name) or web.json_response({"logs": self.jobs[name].log})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["job"]
        if unknown := self._unknown(name):
            return unknown
        job, socket = self.jobs[name], web.WebSocketResponse()
        tail = job.tails.pop(0) if job.tails else Tail(len(job.log), "wait")
        await socket.prepare(request)
        for start in range(0, tail.characters, 50):
            await socket.send_str(job.log[start : min(start + 50, tail.characters)])
        while (tail.end == "hang" or (tail.end == "wait" and job.status == RUNNING)) and request.transport is not None:
            await asyncio.sleep(0.02)
        if not job.tails and tail.end != "wait":
            job.status = job.end
        if tail.end == "cut" and request.transport is not None:
            request.transport.abort()
        return socket


@contextmanager
def dashboard(context: ssl.SSLContext | None = None, **settings: Any) -> Iterator[Dashboard]:
    """A dashboard for a while, on a port of its own, in a thread."""
    found, loop, started = Dashboard(**settings), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(found.app(), shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        found.url = f"{'https' if context else 'http'}://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield found
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def forget_clusters(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Let a test know no cluster and no token: a Ray of the same process sets variables, and people have tokens."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
