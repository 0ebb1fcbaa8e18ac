"""What workers without a GPU set in their processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from raysft.cluster import workers
from raysft.cluster.forkserver import ADDRESS
from raysft.config import parse
from raysft.train import cpu_worker, launch
from raysft.train.process_group import RestartableBackend, RestartableTorchConfig

COUNTS = """
import os, resource
from raysft.train import cpu_worker

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytes(b"x" * (40 << 20))  # more than any threshold that glibc finds by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = faults()
cpu_worker.set_up()
first = faults()
print(by_default, first, faults(), repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


def test_memory_is_kept_and_gpus_are_hidden():
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True, check=True, timeout=60)
    by_default, _, later, visible = done.stdout.split()
    assert 20 * int(later) < int(by_default)
    assert visible == "''"


@pytest.mark.parametrize(("backend", "expected"), [("gloo", [cpu_worker.set_up, "start"]), ("nccl", ["start"])])
def test_workers_set_themselves_up_before_their_process_group_starts(monkeypatch, backend, expected):
    done: list[Any] = []

    class Group:
        def execute(self, function: Any) -> None:
            done.append(function)

    monkeypatch.setattr("ray.train.torch.config._TorchBackend.on_start", lambda *_: done.append("start"))
    RestartableBackend().on_start(Group(), RestartableTorchConfig(backend=backend))
    assert done == expected


def test_only_workers_that_are_no_forks_need_a_runtime_environment(monkeypatch):
    def needs(**settings: Any) -> bool:
        data = {"train": [{"name": "a", "path": "a"}]}
        return launch._keeps_nothing(parse({"model": {"path": "m"}, "data": data, **settings}))

    monkeypatch.setattr(workers, "_running", [])
    monkeypatch.delenv(ADDRESS, raising=False)
    assert needs()
    assert not needs(scaling={"use_gpu": True})
    assert not needs(cluster={"image": "registry/raysft:1"}), "pods have it in their environment"
    monkeypatch.setenv(ADDRESS, "/tmp/socket")  # a trial's process is a fork, too
    assert not needs()
