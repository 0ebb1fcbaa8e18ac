"""A cluster that cannot be joined: one line, within a bound, before Ray is asked to join it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from ray._private.node import Node

from raysft.cli import main
from raysft.cluster import connect, ray_internals, workers
from raysft.config import parse
from raysft.data.shards import ray_pipeline
from raysft.errors import RunStopped
from raysft.run.stop_sources import watched
from raysft.storage.lock import lost_lock
from raysft.storage.path import StoragePath
from tests import messages, samples
from tests.servers import serving, silent


@contextmanager
def port_that(server: str):
    if server == "refuses":
        with closing(socket.create_server(("", 0))) as taken:
            port = taken.getsockname()[1]
        yield port
    else:
        answer: Callable[[socket.socket], None] = {
            "is silent": silent,
            "hangs up": lambda connection: None,
            "speaks HTTP": lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n<html></html>"),
        }[server]
        with serving(answer) as port:
            yield port


@pytest.mark.parametrize("server", ["refuses", "is silent", "hangs up", "speaks HTTP"])
@pytest.mark.parametrize("through", ["RAY_ADDRESS", "scaling.address"])
def test_what_does_not_answer_like_a_cluster_is_given_up_in_time(monkeypatch, server, through):
    monkeypatch.setattr(connect, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(connect, "ATTEMPT_SECONDS", 1.0)
    monkeypatch.setattr(connect, "PAUSE_SECONDS", 0.1)
    with port_that(server) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        begun = time.monotonic()
        said = refusal(None if through == "RAY_ADDRESS" else f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 20
    assert said.startswith(f"{through}=127.0.0.1:{port}: no Ray cluster answers at ")
    assert said.endswith("; check the address, or set scaling.address=local to start one for this run")


@pytest.mark.parametrize(
    ("address", "fact", "remedy"),
    [
        (
            "nonsense",
            "not a valid Ray cluster address (Invalid address format: nonsense)",
            "set HOST:PORT of its head",
        ),
        ("127.0.0.1:abc", "not a valid Ray cluster address (Malformed address port abc", "set HOST:PORT of its head"),
        (
            "127.0.0.1:99999",
            "not a valid Ray cluster address (Invalid address port 99999",
            "set HOST:PORT of its head",
        ),
        ("127.0.0.1:1", "not a valid Ray cluster address (Invalid address port 1.", "set HOST:PORT of its head"),
        (
            "ray://127.0.0.1:10001",
            "raysft cannot join a cluster through a Ray Client or dashboard address",
            "ray job submit --address",
        ),
        (
            "http://127.0.0.1:8265",
            "raysft cannot join a cluster through a Ray Client or dashboard address",
            "ray job submit --address",
        ),
    ],
)
@pytest.mark.parametrize("through", ["RAY_ADDRESS", "scaling.address"])
def test_what_is_no_address_of_a_cluster_is_refused_without_asking_it(monkeypatch, address, fact, remedy, through):
    monkeypatch.setenv("RAY_ADDRESS", address)
    begun = time.monotonic()
    said = refusal(None if through == "RAY_ADDRESS" else address)
    assert time.monotonic() - begun < 10
    assert said.startswith(f"{through}={address}: {fact}")
    assert remedy in said


def test_a_cluster_of_another_version_is_named(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def CheckAlive(self, request, context):
            return gcs_service_pb2.CheckAliveReply(ray_version="2.9.3")

    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
        port = server.add_insecure_port("0.0.0.0:0")
        server.start()
        try:
            said = refusal(f"127.0.0.1:{port}")
        finally:
            server.stop(0)
    assert said.startswith(f"scaling.address=127.0.0.1:{port}: the cluster runs Ray 2.9.3, but this process has ")


@pytest.mark.parametrize("limit", [1 << 20, -1])
def test_a_check_starts_a_cluster_only_for_data_that_it_has_to_tokenize_there(
    tmp_path, model, monkeypatch, capsys, limit
):
    class Started(Exception):
        pass

    def join(address: str | None) -> None:
        raise Started

    data = "data.train=[{name: a, path: " + str(Path(samples.__file__).parent / "alpaca.json") + "}]"
    (tmp_path / "c.yaml").write_text(f"model: {{path: {model}}}\nrun: {{storage: {tmp_path}/runs}}\ndata: {{}}\n")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", limit)
    monkeypatch.setattr(connect, "_join", join)
    with pytest.raises(Started) if limit < 0 else nullcontext():
        assert main(["check", str(tmp_path / "c.yaml"), "scaling.address=local", "data.sequence_length=256", data]) == 0
        assert f"the cluster has {len(os.sched_getaffinity(0))} CPUs" in "".join(capsys.readouterr())
    assert not connect._deferred


def refusal(address: str | None) -> str:
    return messages.refusal(connect._join, address)


def test_workers_with_gpus_are_no_forks(monkeypatch):
    monkeypatch.setattr(workers, "_running", [])
    monkeypatch.setattr(workers, "ForkServer", lambda trials: object())
    workers.start(use_gpu=True)  # CUDA refuses to work in them
    assert not workers._running
    workers.start(use_gpu=False)
    assert len(workers._running) == 1


@pytest.mark.parametrize(("tune", "trials"), [({"space": {"train.seed": [1, 2]}}, True), ({}, False)])
def test_forks_for_a_sweep_have_imported_what_trials_need(monkeypatch, tune, trials):
    asked: list[bool] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(workers, "_running", [])
    monkeypatch.setattr(workers, "ForkServer", asked.append)
    config = {"run": {"name": "a"}, "model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}}
    connect.prepare_workers(parse({**config, "tune": tune}))
    assert asked == [trials]


def test_a_cluster_that_a_run_starts_has_no_services(monkeypatch):
    usual = [getattr(Node, name) for name in ray_internals.SERVICES]
    started: list[Any] = []
    monkeypatch.setattr(
        "ray.init", lambda **options: started.extend(getattr(Node, name) for name in ray_internals.SERVICES)
    )
    connect._join("local")
    assert len(started) == 3
    assert not set(started) & set(usual)


def test_sigterm_while_ray_starts_stops_the_run(tmp_path, monkeypatch):
    """``ray.init`` installs a handler that ends the process with exit code 15."""

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("ray.init", init)
    lost_lock()  # of another test
    with pytest.raises(RunStopped, match=r"^stopped: SIGTERM$"), watched(StoragePath.of(tmp_path), None, print):
        connect._join("local")
