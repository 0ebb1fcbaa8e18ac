"""Clusters that `ray start` makes on this machine, and jobs for them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from raysft.cluster import forkserver, workers

START_SECONDS, REFUSAL_SECONDS = 180, 180
"""Limits, not expectations: several times what a busy machine of 2 cores needs."""

IDLE = {
    "LOG_NAME_UPDATE_INTERVAL_S": "3600",
    "REPORTER_UPDATE_INTERVAL_MS": "3600000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "3600",
}
"""Ray looks for news in log files, of the machine and in event files, which nobody asks for, and takes 5% of a core for it."""


FORKED_NODE = str(Path(__file__).with_name("forked_node.py"))


@dataclass
class Cluster:
    """A cluster of this test alone, with ports, files and an access token of its own: it meets no other Ray of the machine."""

    folder: Path
    """Where it was started."""
    temporary: Path
    """Ray's own files, and the home folders of the nodes."""
    environment: dict[str, str]
    ports: dict[str, int]
    nodes: list[subprocess.Popen] = field(default_factory=list)
    """The head and the other nodes."""
    forks: bool = False
    """True if the workers of each node are forks of a server, as those of a run are; else each of them imports for seconds."""
    servers: list[workers.ForkServer] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://127.0.0.1:{self.ports['dashboard']}"

    def refuse(self, *arguments: str, **environment: str | None) -> str:
        """The one line with which `raysft check` refuses, outside of a job."""
        whole = {**self.environment, **environment}
        done = subprocess.run(
            [program("raysft"), "check", "tiny.yaml", *arguments],
            cwd=self.folder,
            env={key: value for key, value in whole.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=REFUSAL_SECONDS,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        (line,) = (done.stdout + done.stderr).splitlines()
        return line

    def begin(self, *command: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Submit a command as a job; the process ends with it, and prints what it prints."""
        return subprocess.Popen(
            [program("ray"), "job", "submit", "--address", self.dashboard, *options, "--", *command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *command: str, seconds: int, options: Sequence[str] = ()) -> tuple[int, str]:
        """Run a command as a job to its end; gives the exit code of `ray job submit` and all that it printed."""
        with self.begin(*command, options=options) as job:
            try:
                output, _ = job.communicate(timeout=seconds)
            finally:
                job.kill()
        return job.returncode, output

    def jobs(self) -> list[dict[str, Any]]:
        """Jobs as `ray job list` knows them."""
        return self._ask("")

    def log(self, job: str) -> str:
        """All that a job has printed."""
        return self._ask(f"{job}/logs")["logs"]

    def _ask(self, what: str) -> Any:
        """What the Jobs API answers, without a process that imports Ray's client of it."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{what}", headers=token)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)

    def start(self, cpus: int, environment: Mapping[str, str] | None = None, **more: str) -> None:
        """Start a node, with folders of its own as if it were another machine: the head if there is none.

        Args:
            cpus: of the node.
            environment: variables that only this node has.
            more: further options of `ray start`, or other values of those it has here.
        """
        number = len(self.nodes)
        home = self.temporary / f"n{number}" if number else self.temporary
        home.mkdir(exist_ok=True)
        (agent,) = free_ports(1)
        options = {
            "dashboard-agent-listen-port": agent,
            "node-ip-address": "127.0.0.1",
            "num-cpus": cpus,
            "object-store-memory": 200_000_000,
            # In a folder that they share, one node's agent replaces a job's working directory under the other's processes.
            "temp-dir": str(home),
        }
        if number:
            options["address"] = f"127.0.0.1:{self.ports['gcs']}"
        else:
            options |= {"port": self.ports["gcs"], "dashboard-port": self.ports["dashboard"]}
            options |= {"ray-client-server-port": self.ports["client"]}
        options |= more
        variables = {**self.environment, **(environment or {}), "HOME": str(home)}
        ray = [program("ray")]
        if self.forks:
            self.servers.append(workers.ForkServer(trials=True))
            variables[forkserver.ADDRESS] = self.servers[-1].address
            ray = [sys.executable, FORKED_NODE]
        log = self.temporary / f"start{number}.log"
        with log.open("w") as stream:
            node = subprocess.Popen(
                [*ray, "start", "--block", "--disable-usage-stats", *([] if number else ["--head"])]
                + [f"--{key}={value}" for key, value in options.items()],
                cwd=self.folder,
                env=variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self.nodes.append(node)
        wait_until_up(node, log, None if number else self.ports["dashboard"])

    def kill(self, node: subprocess.Popen) -> None:
        """End a node with all its processes, without a word."""
        self.nodes.remove(node)
        kill_node(node)


def joining() -> dict[str, str]:
    """The environment of a command that joins the cluster of this process, whose workers are forks of this process's server."""
    return {**os.environ, forkserver.ADDRESS: workers._running[0].address}


def program(name: str) -> str:
    """Path of a program beside this Python."""
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until_up(node: subprocess.Popen, log: Path, dashboard: int | None) -> None:
    """Wait until a node has joined, and until the dashboard of a head, which comes last, listens."""
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and node.poll() is None:
        if "Ray runtime started" in log.read_text():
            with socket.socket() as probe:
                if dashboard is None or not probe.connect_ex(("127.0.0.1", dashboard)):
                    return
        time.sleep(0.2)
    raise AssertionError(f"ray start did not come up:\n{log.read_text()}")


def kill_node(node: subprocess.Popen) -> None:
    """End this node and nothing else: `ray stop` would end every Ray of the machine."""
    if node.poll() is not None:
        return  # with --block it takes the others along
    processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # nothing of it is kept, and an orderly end takes half a minute
    node.wait(timeout=30)
    psutil.wait_procs(processes, timeout=30)


@contextmanager
def started(folder: Path, cpus: Sequence[int], forks: bool = False) -> Iterator[Cluster]:
    """A cluster for a while.

    Args:
        folder: where it is started: jobs without a working directory begin there.
        cpus: of each node; the first one is the head.
        forks: as ``Cluster`` has it.
    """
    # Not in pytest's folder: the path of a Unix socket has at most 107 characters.
    temporary = Path(tempfile.mkdtemp(prefix="raysft-", dir="/tmp"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= IDLE | {
        "HOME": str(temporary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
    }
    cluster = Cluster(
        folder,
        temporary,
        environment,
        dict(zip(("gcs", "dashboard", "client"), free_ports(3), strict=True)),
        forks=forks,
    )
    try:
        for count in cpus:
            cluster.start(count)
        yield cluster
    finally:
        for node in reversed(cluster.nodes):
            kill_node(node)
        for server in cluster.servers:
            server.stop()
        shutil.rmtree(temporary, ignore_errors=True)
