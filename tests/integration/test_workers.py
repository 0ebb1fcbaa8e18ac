"""Ray's workers are forks of one process that has imported what they need, and like the workers that Ray would start."""

from __future__ import annotations

import atexit
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.cluster_utils import Cluster

from raysft.cluster import forkserver, workers
from raysft.cluster.connect import _ask
from raysft.cluster.ray_internals import WORKER_MODULES, head_without_services
from tests.processes import children_named

SECONDS = 60.0
CLUSTER = """
import os, time, ray
from pathlib import Path
from raysft.cluster import workers
from raysft.cluster.connect import cluster
from raysft.config import parse

@ray.remote
def script():
    return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\\0")[1]

def parent(variables={}):
    return ray.get(script.options(runtime_env={"env_vars": variables}).remote())

with cluster(parse({"run": {"name": "a"}, "model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}})):
"""
"""A driver that can tell what the process runs whose child a worker is."""


class Process:
    """Tells about its process."""

    def process(self) -> tuple[int, str]:
        """Its id, and the script that its parent runs."""
        return os.getpid(), Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[1]

    def imported(self, names: tuple[str, ...]) -> set[str]:
        return set(names) & set(sys.modules)

    def numbers(self) -> tuple[float, float]:
        return random.random(), float(np.random.rand())

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def setting(self, name: str) -> str:
        return Path(f"/proc/self/{name}").read_text()

    def files(self) -> list[str]:
        return sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2))

    def group(self) -> tuple[int, int]:
        return os.getpgid(0), os.getpid()


Worker: Any = ray.remote(num_cpus=1)(Process)


@pytest.fixture
def two(local_ray):
    """Two workers at a time."""
    pair = [Worker.remote() for _ in range(2)]
    yield pair
    for worker in pair:
        ray.kill(worker)


def plain(**environment: str):
    """A worker that Ray starts itself: its command has a prefix, which a fork cannot have."""
    return Worker.options(runtime_env={"py_executable": f"env {sys.executable}", "env_vars": environment}).remote()


def test_workers_are_forks_of_a_process_that_has_imported_their_libraries(two):
    (one, parent), (other, _) = ray.get([worker.process.remote() for worker in two], timeout=SECONDS)
    assert one != other
    assert parent == forkserver.FILE
    of_ray = (name for name in WORKER_MODULES if importlib.util.find_spec(name.partition(".")[0]))
    names = (*forkserver.LIBRARIES, *forkserver.MODULES, *forkserver.TRIALS, *of_ray)
    assert ray.get(two[0].imported.remote(names), timeout=SECONDS) == set(names)


def test_workers_draw_different_random_numbers(two):
    (python, numpy), (others_python, others_numpy) = ray.get(
        [worker.numbers.remote() for worker in two], timeout=SECONDS
    )
    assert python != others_python
    assert numpy != others_numpy


def test_a_fork_is_like_a_worker_that_ray_starts(two):
    """Environment, files, how readily the kernel ends it, and a process group that is not the server's."""
    ray.get(two[1].process.remote(), timeout=SECONDS)
    ray.kill(two[1])
    theirs, ours = plain(), two[0]
    assert ray.get(theirs.process.remote(), timeout=SECONDS)[1] != forkserver.FILE
    environments = ray.get([worker.environment.remote() for worker in (ours, theirs)], timeout=SECONDS)
    different = {name for name in set().union(*environments) if len({e.get(name) for e in environments}) > 1}
    assert different <= {"_", "SHLVL", "RAY_WORKER_ID", "OLDPWD"}
    for name in ("oom_score_adj", "comm"):
        assert ray.get(ours.setting.remote(name), timeout=SECONDS) == ray.get(
            theirs.setting.remote(name), timeout=SECONDS
        )
    group, pid = ray.get(ours.group.remote(), timeout=SECONDS)
    assert group == pid
    ray.kill(theirs)


class Leaves:
    """Notes in a file what happens when its process ends."""

    def __init__(self, path: str) -> None:
        self.note = open(path, "a", encoding="utf-8")  # noqa: SIM115  # what is not flushed when the process ends is lost
        sys.modules["kept"] = self  # type: ignore[assignment]
        atexit.register(self.note.flush)
        atexit.register(self.note.write, "handled ")  # the last one that is registered is called first

    def __del__(self) -> None:
        self.note.write("freed")

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> None:
        """End as Ray's own actors do, in good order."""
        ray.actor.exit_actor()


def test_a_fork_ends_with_its_exit_handlers_and_frees_nothing(local_ray, tmp_path):
    """To free what it has imported would copy each page of it first."""
    worker: Any = ray.remote(num_cpus=1)(Leaves).remote(str(tmp_path / "note"))
    process = psutil.Process(ray.get(worker.pid.remote(), timeout=SECONDS))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.leave.remote(), timeout=SECONDS)
    process.wait(timeout=SECONDS)
    assert (tmp_path / "note").read_text() == "handled "


def test_variables_of_a_runtime_environment_reach_a_fork(local_ray):
    worker = Worker.options(runtime_env={"env_vars": {"RAYSFT_TEST": "näh"}}).remote()
    assert ray.get(worker.process.remote(), timeout=SECONDS)[1] == forkserver.FILE
    environment: Any = ray.get(worker.environment.remote(), timeout=SECONDS)
    assert environment["RAYSFT_TEST"] == "näh"
    ray.kill(worker)


def test_a_worker_that_is_killed_is_replaced(local_ray):
    """The process that Ray has started ends with the fork."""

    @ray.remote(num_cpus=1, max_retries=1)
    def die_once(path: str) -> int:
        if not os.path.exists(path):
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    marker = local_ray / "died"
    marker.unlink(missing_ok=True)
    assert ray.get(die_once.remote(str(marker)), timeout=SECONDS)
    assert marker.exists()


def test_a_cluster_of_ones_own_has_no_process_that_nobody_asks(local_ray):
    """Ray would start an autoscaler, a reader of logs and an API."""
    assert list(children_named("gcs_server"))
    for name in ("/monitor.py", "/log_monitor.py", "/dashboard.py"):
        assert not list(children_named(name))


def driver(script: str, **environment: str) -> subprocess.Popen[str]:
    """A driver of its own, that holds a cluster while the script runs."""
    return subprocess.Popen(
        [sys.executable, "-c", CLUSTER + textwrap.indent(script, "    ")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@contextmanager
def head(cpus: int) -> Iterator[Cluster]:
    """A cluster of one node, without what its head would serve to others."""
    with head_without_services():
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_the_server_ends_with_a_driver_that_is_killed_and_leaves_nothing(local_ray):
    script = "print(parent(), os.path.dirname(workers._running[0].address), flush=True); time.sleep(600)"
    with driver(script, RAY_ADDRESS=ray.get_runtime_context().gcs_address) as process:
        file, folder = line(process).split()
        assert file == forkserver.FILE
        assert os.path.exists(folder)
        process.kill()
        process.wait(timeout=SECONDS)
    limit = time.monotonic() + SECONDS
    while os.path.exists(folder):
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_driver_that_was_told_of_a_server_starts_none(local_ray):
    """As a process that a fork starts is; the workers of the cluster that it joins are forks of that server."""
    variables = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, forkserver.ADDRESS: workers._running[0].address}
    with driver("print(parent(), workers._running, flush=True)", **variables) as process:
        assert line(process) == f"{forkserver.FILE} []\n"
        assert process.wait(timeout=SECONDS) == 0


def test_a_server_that_has_ended_is_not_missed():
    """Its forks go on; later workers start in Ray's own way."""
    script = """
print(parent(), flush=True)
workers._running[0].stop()
print(parent({"A": "b"}), flush=True)
"""
    with driver(script, RAY_ADDRESS="local") as process:
        assert line(process).strip() == forkserver.FILE
        assert line(process).startswith("--raylet_socket_name")
        assert process.wait(timeout=SECONDS) == 0


def test_workers_of_a_cluster_that_is_joined_are_forks_if_it_has_one_node():
    """Ray has one command for the workers of all nodes, and the server is on one."""
    with head(cpus=1) as cluster:
        with driver("print(parent(), flush=True)", RAY_ADDRESS=str(cluster.address)) as process:
            assert line(process).strip() == forkserver.FILE
            assert process.wait(timeout=SECONDS) == 0
        cluster.add_node(num_cpus=1)
        with driver("print(parent(), workers._running, flush=True)", RAY_ADDRESS=str(cluster.address)) as process:
            printed = line(process)
            assert printed.startswith("--raylet_socket_name")
            assert printed.endswith("[]\n"), "the server has nothing to do"
            assert process.wait(timeout=SECONDS) == 0


def test_a_folder_for_temporary_files_with_a_long_path_is_left_as_it_was(tmp_path, monkeypatch):
    """A socket's path has 107 characters at most; then Ray starts the workers."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(workers, "_running", [])
    workers.start(use_gpu=False)
    assert workers._running == []
    assert list(folder.iterdir()) == []


def test_a_server_outlives_what_others_send(local_ray):
    (server,) = workers._running
    for sent in (b"", b"\0", b"\0\0\0\5{}", b"\0\0\0\2{}", b"\0\0\0\1["):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(SECONDS)
            connection.connect(server.address)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"", "it hangs up"
    assert server._process.poll() is None


def test_workers_of_a_cluster_that_may_grow_are_not_forked(local_ray, monkeypatch):
    """A head without CPUs has other nodes, sooner or later; a job's workers have an environment of their own."""
    address = ray.get_runtime_context().gcs_address
    assert _ask(address, "it")
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert not _ask(address, "it")
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR)
    with head(cpus=0) as cluster:
        assert not _ask(str(cluster.address), "it")
