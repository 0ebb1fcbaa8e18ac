"""`ray job submit` to a cluster that `ray start --head` made: on 2 CPUs, with a tiny model."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny import SENTENCES, tiny_model

CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: lora}}
data:
  train: [{{name: chat, path: chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train: {{max_steps: 2, global_batch_size: 2, save_every_steps: 1}}
scaling: {{threads_per_worker: 1}}
generate: {{compare_base: false, max_examples: 2, max_new_tokens: 4, do_sample: false}}
"""
START_SECONDS, JOB_SECONDS, REFUSAL_SECONDS = 90, 240, 90
"""Limits, not expectations: several times what a busy machine of 2 cores needs."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of one node, of this test alone."""

    dashboard: str
    folder: Path
    """Where it was started."""
    environment: dict[str, str]
    ports: dict[str, int]

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

    def submit(self, *command: str, seconds: int) -> tuple[int, str]:
        """Run a command as a job to its end; gives the exit code of `ray job submit` and all that it printed."""
        done = subprocess.run(
            [program("ray"), "job", "submit", "--address", self.dashboard, "--", *command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        return done.returncode, done.stdout

    def jobs(self) -> list[dict[str, Any]]:
        """Jobs as `ray job list` knows them."""
        script = (
            "import json, sys; from ray.job_submission import JobSubmissionClient as Client;"
            "print(json.dumps([job.model_dump(mode='json') for job in Client(sys.argv[1]).list_jobs()]))"
        )
        listed = subprocess.run(
            [sys.executable, "-c", script, self.dashboard],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(listed.stdout.splitlines()[-1])


def program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, conversations, and a config that names them."""
    folder = tmp_path_factory.mktemp("cluster")
    tiny_model(folder / "base")
    words = " ".join(SENTENCES).split()
    with (folder / "chat.jsonl").open("w") as file:
        for index in range(40):
            texts = (" ".join(words[index % 40 :][:4]), " ".join(words[index * 7 % 40 :][:5]))
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def cluster(folder) -> Iterator[Cluster]:
    """`ray start --head` with ports, files and an access token of its own, so that it meets no other Ray of the machine."""
    # Not in pytest's folder: the path of a Unix socket has at most 107 characters.
    temporary = tempfile.mkdtemp(prefix="raysft-", dir="/tmp")
    gcs, dashboard, agent, client = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "HOME": temporary,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
    }
    options = {
        "port": gcs,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "object-store-memory": 200_000_000,
        "temp-dir": temporary,
    }
    with open(f"{temporary}/start.log", "w+") as log:
        head = subprocess.Popen(
            [program("ray"), "start", "--head", "--block", "--disable-usage-stats"]
            + [f"--{key}={value}" for key, value in options.items()],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_up(head, dashboard, Path(log.name))
            ports = {"gcs": gcs, "client": client}
            yield Cluster(f"http://127.0.0.1:{dashboard}", folder, environment, ports)
        finally:
            stop(head)
            shutil.rmtree(temporary, ignore_errors=True)


def wait_until_up(head: subprocess.Popen, dashboard: int, log: Path) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and head.poll() is None:
        with socket.socket() as probe:
            # The dashboard listens last, after the node has joined.
            if "Ray runtime started" in log.read_text() and not probe.connect_ex(("127.0.0.1", dashboard)):
                return
        time.sleep(0.2)
    raise AssertionError(f"ray start did not come up:\n{log.read_text()}")


def stop(head: subprocess.Popen) -> None:
    """End this cluster and nothing else: `ray stop` would end every Ray of the machine."""
    if head.poll() is not None:
        return  # with --block it takes the others along
    processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # nothing of it is kept, and an orderly end takes half a minute
    head.wait(timeout=30)
    psutil.wait_procs(processes, timeout=30)


def test_a_submitted_run_joins_the_cluster_and_is_complete(cluster):
    # A relative path: a job starts where `ray start` was called, unless it brings a working directory along.
    code, output = cluster.submit("raysft", "run", "tiny.yaml", seconds=JOB_SECONDS)
    assert code == 0, output
    assert "step 2/2 | loss " in output
    run = cluster.folder / "runs" / "tiny"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "plan.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
        "predict_results.json",
        "all_results.json",
        "generated_predictions.jsonl",
        "training_loss.png",
        "rejected.jsonl",
        "checkpoints",
        "model",
        "README.md",
    }
    assert (run / "model" / "adapter_model.safetensors").exists()
    assert json.loads((run / "plan.json").read_text())["cluster_cpus"] == 2
    # This cluster's own books name the driver: it did not start a Ray of its own.
    job = next(job for job in cluster.jobs() if job["entrypoint"] == "raysft run tiny.yaml")
    assert job["status"] == "SUCCEEDED"
    assert job["driver_info"]["pid"]


def test_more_workers_than_the_cluster_has_end_the_job_at_once(cluster):
    code, output = cluster.submit(
        "raysft", "run", "tiny.yaml", "scaling.num_workers=3", "run.name=large", seconds=REFUSAL_SECONDS
    )
    assert code != 0
    # Once in the job's log, and once more as Ray's reason for the end of the job.
    (line,) = {line for line in output.splitlines() if "raysft: " in line}
    assert line.startswith("raysft: error: scaling.num_workers=3 needs 1 CPU per worker, but the cluster ")
    assert line.endswith("; use scaling.num_workers=1, or add nodes")
    assert "exit code 2" in output
    assert "Traceback" not in output
    assert not (cluster.folder / "runs" / "large").exists()
    job = next(job for job in cluster.jobs() if "scaling.num_workers=3" in job["entrypoint"])
    assert job["end_time"] - job["start_time"] < 1000 * REFUSAL_SECONDS


@pytest.mark.parametrize(
    ("token", "fact"),
    [
        ({"RAY_AUTH_MODE": None}, "the cluster requires another access token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the cluster requires another access token"),
        ({"RAY_AUTH_TOKEN": None}, "RAY_AUTH_MODE=token, but there is no token"),
    ],
)
def test_a_cluster_that_wants_another_token_says_so_at_once(cluster, token, fact):
    address = f"127.0.0.1:{cluster.ports['gcs']}"
    assert cluster.refuse(f"scaling.address={address}", **token) == (
        f"raysft: error: scaling.address={address}: {fact}; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the file "
        "~/.ray/auth_token) to the cluster's token"
    )


def test_the_server_of_ray_clients_is_not_taken_for_the_cluster(cluster):
    address = f"127.0.0.1:{cluster.ports['client']}"
    line = cluster.refuse(RAY_ADDRESS=address)
    assert line.startswith(f"raysft: error: RAY_ADDRESS={address}: no Ray cluster answers at ")
    assert line.endswith("; check the address, or set scaling.address=local to start one for this run")
