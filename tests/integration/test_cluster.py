"""`ray job submit` and `raysft submit` to a cluster that `ray start --head` made: on 2 CPUs, with a tiny model."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from raysft.config import load
from raysft.storage.json_files import read_jsonl
from raysft.submit.jobs_internals import Jobs
from raysft.submit.request import STOP_SECONDS, job_request
from raysft.submit.submission import start
from raysft.train.checkpoint.catalog import newest
from tests.clusters import REFUSAL_SECONDS, Cluster, program, started
from tests.servers import forwarding
from tests.tiny import SENTENCES, tiny_model

CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: lora}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train: {{max_steps: 2, global_batch_size: 2, save_every_steps: 1}}
scaling: {{threads_per_worker: 1}}
generate: {{compare_base: false, max_examples: 2, max_new_tokens: 4, do_sample: false}}
"""
SAVING_SECONDS = 6
SAVES = f"""
import signal, sys, time

def save(*signal_and_frame):
    time.sleep({SAVING_SECONDS})
    print("saved")
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
print("works")
while True:
    signal.pause()
"""
"""What a run does when it is stopped, without the rest of a run."""
JOB_SECONDS = 600
"""A limit, not an expectation: several times what a busy machine of 2 cores needs."""


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
    """One node."""
    with started(folder, [2]) as cluster:
        yield cluster


@contextmanager
def sent(cluster: Cluster, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of raysft, in the cluster's environment, that is looked at while it runs."""
    process = subprocess.Popen(
        [program("raysft"), *arguments],
        cwd=cluster.folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def done(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command of raysft."""
    with sent(cluster, *arguments) as process:
        output, errors = process.communicate(timeout=JOB_SECONDS)
    return process.returncode, output, errors


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


def test_a_config_that_is_sent_is_followed_through_lost_connections_to_its_end(cluster):
    # Trained above: the job has little to do. A cut at each of its first lines, and no answer for some seconds.
    with forwarding(cluster.ports["dashboard"]) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        with sent(cluster, "submit", "tiny.yaml", "--to", address, "--follow") as process:
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if len(lines) in (2, 3, 8):
                    proxy.cut(seconds=4 if len(lines) == 3 else 0)
            code, errors = process.wait(60), process.stderr.read() if process.stderr else ""
    assert code == 0, errors
    assert proxy.cuts >= 3
    job = next(job for job in cluster.jobs() if job["entrypoint"] == "exec raysft run config.yaml")
    name = job["submission_id"]
    assert lines[0] == f"{name}: submitted to {address} (run directory {cluster.folder}/runs/tiny)\n"
    assert "".join(lines[1:-1]) == cluster.log(name)
    assert any("is already trained" in line for line in lines)
    assert lines[-1] == f"{name}: has succeeded\n"
    # The same command again has nothing to do.
    code, output, errors = done(cluster, "submit", "tiny.yaml", "--to", cluster.dashboard, "--follow")
    assert (code, errors) == (0, "")
    assert output.startswith(f"{name}: is done (run directory ")


def test_more_workers_than_the_cluster_has_end_the_job_at_once(cluster):
    arguments = ("submit", "tiny.yaml", "--to", cluster.dashboard, "--follow")
    code, output, errors = done(cluster, *arguments, "scaling.num_workers=3", "run.name=large")
    assert code == 2, errors  # as raysft says it; `ray job submit` makes 1 of it
    (line,) = (line for line in output.splitlines() if "raysft: " in line)
    assert line.startswith("raysft: error: scaling.num_workers=3 needs 1 CPU per worker, but the cluster ")
    assert line.endswith("; use scaling.num_workers=1, or add nodes")
    assert output.splitlines()[-1].endswith(": has failed with exit code 2")
    assert "Traceback" not in output
    assert not (cluster.folder / "runs" / "large").exists()
    job = next(job for job in cluster.jobs() if "raysft-large-" in job["submission_id"])
    assert job["end_time"] - job["start_time"] < 1000 * REFUSAL_SECONDS


def test_a_job_that_is_stopped_has_more_than_rays_three_seconds_to_save_its_work(cluster, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, cluster.environment[name])
    script = cluster.folder / "saves.py"
    script.write_text(SAVES)
    request = job_request(load(cluster.folder / "tiny.yaml", ["run.name=long"]))
    assert request.entrypoint == "exec raysft run config.yaml"
    name, jobs = f"{request.prefix}1", Jobs(cluster.dashboard)
    start(jobs, name, replace(request, entrypoint=f"exec {sys.executable} {script}"))
    limit = time.monotonic() + REFUSAL_SECONDS
    while "works\n" not in jobs.log(name):
        assert time.monotonic() < limit, jobs.log(name)
        time.sleep(0.2)
    # The same config attaches to it, and another one may not use its run directory.
    submit = ("submit", "tiny.yaml", "--to", cluster.dashboard, "--no-follow", "run.name=long")
    assert done(cluster, *submit)[1].startswith(f"{name}: is already running; nothing was submitted\n")
    code, _, errors = done(cluster, *submit, "train.epochs=2")
    assert code == 2
    assert f"{name} is running with another config" in errors
    began = time.monotonic()
    code, output, errors = done(cluster, "stop", name, "--to", cluster.dashboard)
    assert (code, errors) == (0, "")
    assert f"{name}: has been stopped; its last line: saved\n" in output
    assert SAVING_SECONDS < time.monotonic() - began < STOP_SECONDS / 2, "Ray notices that it has ended"
    assert jobs.details(name).status == "STOPPED"


@pytest.mark.parametrize(
    ("token", "fact"),
    [
        ({"RAY_AUTH_MODE": None}, "the cluster requires a different access token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "the cluster requires a different access token"),
        ({"RAY_AUTH_TOKEN": None}, "RAY_AUTH_MODE=token, but no token is set"),
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


def test_a_node_that_gets_sigterm_and_30_seconds_later_sigkill_loses_nothing_of_the_run_that_it_drives(cluster):
    """As Kubernetes ends the pod of a head, whose process this is; nobody tells the driver. The last test: it ends the cluster."""
    (node,) = cluster.nodes
    run = cluster.folder / "runs" / "evicted"
    many = ["train.max_steps=2000", "train.epochs=2000", "train.save_every_steps=null", "data.holdout=0"]
    address = f"scaling.address=127.0.0.1:{cluster.ports['gcs']}"
    driver = subprocess.Popen(
        [program("raysft"), "train", "tiny.yaml", "run.name=evicted", *many, address],
        cwd=cluster.folder,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    alarm = threading.Timer(JOB_SECONDS, driver.kill)
    alarm.start()
    assert driver.stdout
    next(line for line in driver.stdout if line.startswith("step 3/"))
    node.terminate()
    kill = threading.Timer(30, cluster.kill, [node])
    kill.start()
    output, error = driver.communicate()
    in_time = kill.is_alive()
    kill.cancel()
    alarm.cancel()
    assert driver.returncode == 75, output + error
    assert in_time
    assert re.search(
        r"the driver's node [0-9a-f]{8} is drained: the run will end as soon as its work is saved, \d+ s before", output
    )
    checkpoint = newest(run / "checkpoints")
    assert checkpoint
    step = checkpoint.cursor.step
    assert re.search(
        rf"raysft: stopped after step {step}: .* is drained; checkpoint written \d+ s before the machine", error
    )
    steps = [record["current_steps"] for record in read_jsonl(run / "trainer_log.jsonl") if "loss" in record]
    assert steps == list(range(1, step + 1)), "the checkpoint is that of the last step"
