"""Whole runs in an object store: a real S3 server that fails on demand, machines that come and go."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors import numpy as safetensors

import raysft
from raysft.cli import main
from raysft.config import load
from raysft.models.peft_internals import TRAINED
from raysft.storage.path import StoragePath
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.cursor import Cursor
from tests.objects import Server
from tests.tiny import tiny_model, write_chats

CONFIG = """
run: {{storage: "{storage}", seed: 1}}
model: {{path: "{model}", dtype: float32, finetuning: lora}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train:
  epochs: 2
  global_batch_size: 4
  learning_rate: 1.0e-2
  save_every_steps: 2
  eval_every_steps: 3
  keep_best: true
scaling: {{threads_per_worker: 1}}
generate: {{max_examples: 4, max_new_tokens: 4, do_sample: false, compare_base: false, metrics: []}}
"""


@pytest.fixture(scope="module")
def folder(local_ray, server, tmp_path_factory) -> Path:
    """A model in the object store, data and a config."""
    folder = tmp_path_factory.mktemp("storage")
    StoragePath.of(server.uri("models/base")).upload(tiny_model(folder / "base"))
    write_chats(folder / "chat.jsonl", 60)
    text = CONFIG.format(folder=folder, storage=server.uri("runs"), model=server.uri("models/base"))
    (folder / "c.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def healed(server) -> Iterator[None]:
    """Faults of one test are not those of the next, whatever came of it."""
    yield
    server.heals()


def place(server: Server, name: str) -> StoragePath:
    return StoragePath.of(server.uri(f"runs/{name}"))


def losses(run: StoragePath) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    return {record["current_steps"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def whole(server, folder) -> StoragePath:
    """A run that was left alone."""
    assert main(["run", str(folder / "c.yaml"), "run.name=whole"]) == 0
    return place(server, "whole")


def test_a_run_in_an_object_store_is_all_there(whole, folder, local_ray, capsys):
    files = whole.walk()
    assert {
        "config.yaml",
        "plan.json",
        "trainer_log.jsonl",
        "trainer_state.json",
        "all_results.json",
        "generated_predictions.jsonl",
        "training_loss.png",
        "README.md",
        "model/adapter_config.json",
        "model/adapter_model.safetensors",
    } <= files.keys()
    assert any(name.startswith("tensorboard/") for name in files)
    assert not [name for name in files if "/.best" in name or ".lock" in name or "partial" in name]
    assert len(list(catalog.complete(whole / "checkpoints"))) == 2, "train.keep_last"
    assert any(name.startswith("cache/shards/") for name in whole.parent.walk())
    # What is done is done on every machine.
    shutil.rmtree(local_ray / ".cache" / "raysft")
    assert main(["run", str(folder / "c.yaml"), "run.name=whole"]) == 0
    assert "is already trained" in capsys.readouterr().out
    assert main(["report", whole.location]) == 0
    assert main(["export", whole.location, "--output", str(folder / "exported")]) == 0
    assert (folder / "exported" / "model.safetensors").stat().st_size
    newest = catalog.newest(whole / "checkpoints")
    assert newest is not None
    step = (whole / "checkpoints" / str(newest.cursor.step)).location
    assert main(["export", step, "--output", str(folder / "checkpoint"), "--no-merge"]) == 0
    pieces = safetensors.load((newest.path / "part_0.safetensors").read_bytes())
    trained = {name.split(":", 2)[2]: weight for name, weight in pieces.items() if name.startswith("weight:0:")}
    written = safetensors.load_file(folder / "checkpoint" / "adapter_model.safetensors")
    assert len(written) == len(trained)
    for name, weight in written.items():
        assert np.array_equal(weight.ravel(), trained[f"model.{name.replace('.weight', f'.{TRAINED}.weight')}"]), name
    assert main(["evaluate", str(folder / "c.yaml"), "run.name=whole"]) == 0


def test_another_machine_goes_on_where_one_was_killed(whole, server, folder):
    """Killed (SIGKILL) in the middle, its working copy and its disk gone, the same command ends as if nothing had been."""
    command = [sys.executable, "-m", "raysft", "train", str(folder / "c.yaml"), "run.name=killed"]
    killed = place(server, "killed")
    environment = {**os.environ, "HOME": str(folder / "elsewhere")}
    server.fails("checkpoint_00000006", seconds=600)  # so that it is in the middle however quick it is
    with subprocess.Popen(
        [*command, "scaling.address=local"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        alarm = threading.Timer(150, process.kill)
        alarm.start()
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("checkpoint after step 4"):
                break
        else:
            raise AssertionError("".join(said))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        alarm.cancel()
    psutil.wait_procs(children, timeout=10)
    server.heals()
    shutil.rmtree(folder / "elsewhere")
    newest = catalog.newest(killed / "checkpoints")
    assert newest
    assert newest.cursor.step == 4
    # One more, of which the last worker's part did not come to its end.
    torn = killed / "checkpoints" / catalog.folder_name(5, "torn")
    for name, entry in newest.path.walk().items():
        if name != "part_0.json":
            assert entry.size
            (torn / name).write_bytes((newest.path / name).read_bytes())
    assert catalog.newest(killed / "checkpoints") == newest
    lock = json.loads((killed / ".lock").read_text())
    assert lock["process"] == process.pid
    assert main(["train", str(folder / "c.yaml"), "run.name=killed"]) == 0
    assert losses(killed) == losses(whole), "bit for bit"
    weights = "model/adapter_model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()
    assert not torn.exists()


class Seen:
    """What happened, in its order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_step(self, record) -> None:
        self.events.append(f"step {record.current_steps}")

    def on_checkpoint(self, content) -> None:
        self.events.append(f"checkpoint {content['step']}")


def test_a_storage_that_fails_costs_a_checkpoint_and_no_step(server, folder, capsys):
    seen, before = Seen(), server.refused
    server.fails("checkpoint_00000002", seconds=8)
    server.fails("(PUT|POST) .*checkpoint_00000006", seconds=600, status=403)
    try:
        raysft.run_sft(
            load(folder / "c.yaml", ["run.name=fails", "generate.enabled=false", "model.finetuning=full"]),
            callbacks=[seen],
        )
    finally:
        server.heals()
    assert server.refused > before
    run = place(server, "fails")
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert seen.events.index("checkpoint 2") > seen.events.index("step 6"), "the training went on meanwhile"
    said = capsys.readouterr().out
    assert "waiting for the storage, at most 600 s" in said
    assert "no checkpoint after step 4: that after step 2 is still being written; training continues" in said
    host = socket.gethostname()
    assert f"fails, worker 0 ({host}): s3://{server.bucket}/runs/fails/checkpoints/" in said
    assert f"fails, worker 0 ({host}): no checkpoint after step 6: s3://{server.bucket}/runs/fails/checkpoints/" in said
    assert "ACCESS_DENIED" in said
    assert [Cursor.read(each).step for each in catalog.complete(run / "checkpoints")] == [2]
    assert {"config.json", "model.safetensors"} <= (run / "model").entries().keys()


def test_a_bucket_that_is_not_there_is_one_line(server, folder, capsys):
    storage = server.uri("runs").replace(server.bucket, "nobucket")
    for verb in ("run", "check"):
        assert main([verb, str(folder / "c.yaml"), f"run.storage='{storage}'"]) == 2
        error = capsys.readouterr().err
        assert "run.storage: s3://nobucket/runs" in error
        assert "NO_SUCH_BUCKET" in error
        assert error.count("\n") == 1
