"""Sweeps in an object store: a driver that is killed goes on from another machine."""

import json
import shutil
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import ray

from raysft.cli import main
from raysft.config import load
from raysft.storage.path import StoragePath
from raysft.train.checkpoint import catalog
from raysft.tune.trials import combinations
from tests.clusters import joining
from tests.objects import Server
from tests.processes import children_named, command
from tests.tiny import tiny_model, write_chats

RATES, STEPS = [1.0e-3, 1.0e-2], 6
CONFIG = """
run: {{storage: "{storage}", seed: 1}}
model: {{path: "{model}", dtype: float32, finetuning: lora}}
data:
  train: [{{name: chat, path: "{data}"}}]
  holdout: 0.2
  sequence_length: 128
train: {{epochs: 5, max_steps: {steps}, global_batch_size: 4, save_every_steps: 2, eval_at_start: false}}
scaling: {{threads_per_worker: 1}}
generate: {{enabled: false}}
tune: {{space: {{train.learning_rate: {rates}}}, max_concurrent: 1}}
"""


@pytest.fixture(scope="module")
def text(server, tmp_path_factory) -> str:
    """A config whose model, data and runs are all in the object store."""
    folder = tmp_path_factory.mktemp("tune-storage")
    StoragePath.of(server.uri("tune/models/base")).upload(tiny_model(folder / "base"))
    write_chats(folder / "chat.jsonl", 60)
    StoragePath.of(server.uri("tune/data/chat.jsonl")).upload(folder / "chat.jsonl")
    places = {"storage": "tune/runs", "model": "tune/models/base", "data": "tune/data/chat.jsonl"}
    return CONFIG.format(rates=RATES, steps=STEPS, **{key: server.uri(path) for key, path in places.items()})


def place(server: Server, name: str) -> StoragePath:
    return StoragePath.of(server.uri(f"tune/runs/{name}"))


def lines_of(file: StoragePath) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def last_lines(sweep: StoragePath) -> dict[str, dict]:
    """The last line of each trial in a sweep's record."""
    return {line["trial"]: line for line in lines_of(sweep / "trials.jsonl")}


def wait_for_a_checkpoint(
    run: StoragePath, step: int, process: BaseProcess, output: Path, seconds: float = 120
) -> None:
    limit = time.monotonic() + seconds
    while (newest := catalog.newest(run / "checkpoints")) is None or newest.cursor.step < step:
        assert process.is_alive(), output.read_text()
        assert time.monotonic() < limit, f"{run} has no checkpoint after step {step}"
        time.sleep(0.5)  # each look is some requests, which the server in this process answers


def kill_sweep(process: BaseProcess) -> None:
    """Kill a driver and what runs for its trial at once, as if their machine were gone."""
    process.kill()
    killed = [one for name in ("Trainable", "TrainController", "RayTrainWorker") for one in children_named(name)]
    for one in killed:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(killed, timeout=60)
    process.join()


def test_a_sweep_that_was_killed_goes_on_from_another_machine(server, text, tmp_path, local_ray, monkeypatch, capsys):
    """With the same URI and nothing else: what is done is not repeated, what is not goes on from its checkpoint."""
    machines = [tmp_path / "one", tmp_path / "other"]
    for machine in machines:
        machine.mkdir()
        (machine / "sweep.yaml").write_text(text)
    monkeypatch.chdir(machines[1])
    done, interrupted = [trial.name for trial in combinations(load("sweep.yaml"))]
    sweep = place(server, "sweep")
    server.fails(
        f"(PUT|POST) .*{interrupted}/checkpoints/checkpoint_00000004", seconds=600
    )  # so that it is in the middle
    joins, output = f"scaling.address={ray.get_runtime_context().gcs_address}", tmp_path / "printed"
    process = command(["tune", "sweep.yaml", joins], machines[0], output, joining())
    process.start()
    try:
        wait_for_a_checkpoint(sweep / "trials" / interrupted, 2, process, output)
    finally:
        kill_sweep(process)
        server.heals()
    # What the machine had of files in the store is gone with it.
    for folder in (machines[0], local_ray / ".cache" / "raysft"):
        shutil.rmtree(folder)
    assert {name: line["state"] for name, line in last_lines(sweep).items()} == {done: "done", interrupted: "running"}
    before, asked = (sweep / "trials" / done).walk(), len(server.requests)
    assert main(["tune", "sweep.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "2 trials, 1 at a time, 1 done before" in shown
    assert shown.count("started: ") == 1
    assert (sweep / "trials" / done).walk() == before
    read = [request for request in server.requests[asked:] if request.startswith("GET")]
    assert any(
        f"{interrupted}/checkpoints/checkpoint_00000002" in request and "part_0.safe" in request for request in read
    )
    records = last_lines(sweep)
    assert [(name, line["state"], line["number"]) for name, line in records.items()] == [
        (done, "done", 0),
        (interrupted, "done", 1),
    ]
    for name in (done, interrupted):
        run = sweep / "trials" / name
        steps = [line["current_steps"] for line in lines_of(run / "trainer_log.jsonl") if "loss" in line]
        assert steps == list(range(1, STEPS + 1))
        results = json.loads((run / "all_results.json").read_text())
        assert records[name]["metrics"]["eval_loss"] == results["eval_loss"]


@pytest.mark.usefixtures("local_ray")
def test_a_sweep_in_an_object_store_is_all_there(server, text, tmp_path, local_ray, monkeypatch, capsys):
    """Also for a machine that has nothing of it; needs the sweep of the test before."""
    sweep = place(server, "sweep")
    assert {name for name, entry in sweep.entries().items() if not entry.folder} == {
        "config.yaml",
        "trials.jsonl",
        "tune_results.json",
        "trials.csv",
        "best.yaml",
        "sweep.html",
    }
    page = (sweep / "sweep.html").read_text()
    assert all(name in page for name in last_lines(sweep))
    shutil.rmtree(local_ray / ".cache" / "raysft")
    (tmp_path / "sweep.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = (sweep / "trials.jsonl").read_text()
    assert main(["tune", "sweep.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "2 done before" in shown
    assert "started: " not in shown
    assert (sweep / "trials.jsonl").read_text() == before
    (tmp_path / "best.yaml").write_text((sweep / "best.yaml").read_text())
    assert main(["check", "best.yaml"]) == 0
    assert f"run directory: s3://{server.bucket}/tune/runs/sweep-best" in capsys.readouterr().out
