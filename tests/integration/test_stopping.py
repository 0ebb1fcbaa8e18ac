"""Trainings that are asked to stop, each in another way, and go on; with a tiny model, as one that was left alone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from raysft.cli import main
from raysft.run.stop_file import request_stop
from raysft.storage.json_files import read_jsonl
from raysft.storage.path import StoragePath
from tests.clusters import joining
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("local_ray")
STEPS = 160
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, dtype: float32, finetuning: full}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train:
  epochs: 60
  max_steps: {steps}
  global_batch_size: 2
  learning_rate: 1.0e-3
  zero_stage: 0
  eval_every_steps: 40
  trackers: []
scaling: {{threads_per_worker: 1}}
generate: {{enabled: false}}
"""
GRACE_SECONDS = 30
"""From SIGTERM to SIGKILL, as Kubernetes has it by default."""
SECONDS = 300
"""A limit, not an expectation."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    return tiny_folder(folder, CONFIG.format(folder=folder, steps=STEPS), file="tiny.yaml", chat=60)


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """A run that nobody stops."""
    assert main(["train", str(folder / "tiny.yaml"), "run.name=alone"]) == 0
    return folder / "runs" / "alone"


def records(run: Path) -> list[tuple]:
    """Step, loss and evaluation of each record of the log."""
    keys = ("current_steps", "loss", "grad_norm", "rows", "eval_loss", "eval_accuracy")
    try:
        return [tuple(record.get(key) for key in keys) for record in read_jsonl(run / "trainer_log.jsonl")]
    except (OSError, ValueError):
        return []  # a line that is being written


def is_the_same(run: Path, alone: Path) -> bool:
    """Whether two runs came to the same, bit for bit, with each step and each evaluation once."""
    models = [(one / "model" / "model.safetensors").read_bytes() for one in (run, alone)]
    return records(run) == records(alone) and models[0] == models[1]


@contextlib.contextmanager
def at(run: Path, more: int, act: Callable[[], None]) -> Iterator[None]:
    """Do something in the block once a run has so many records more than now."""
    before = len(records(run))

    def wait() -> None:
        limit = time.monotonic() + SECONDS
        while not ended.is_set() and time.monotonic() < limit:
            if len(records(run)) >= before + more:
                act()
                return
            time.sleep(0.02)

    ended = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_what_is_stopped_in_each_way_and_goes_on_is_the_run_left_alone(folder, alone, capsys):
    run, command = folder / "runs" / "stopped", ["train", str(folder / "tiny.yaml"), "run.name=stopped"]
    with at(run, 5, lambda: request_stop(StoragePath.of(run), "alice needs the machine")):
        assert main(command) == 75
    said = capsys.readouterr()
    step = records(run)[-1][0]
    assert said.err == (
        f"raysft: stopped after step {step}: alice needs the machine; checkpoint written; run the same command again to "
        "resume\n"
    )
    assert (
        "alice needs the machine: the run will end as soon as its work is saved; press Ctrl-C or send SIGTERM again"
        in said.out
    )
    assert step < STEPS
    assert not (run / "stop").exists()
    assert not (run / "model").exists()

    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with at(run, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            assert main(command) == 75
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM], "only what comes after the run is for who called it"
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr()
    assert f"resuming after step {step} " in said.out
    assert records(run)[-1][0] > step
    assert ": SIGTERM; checkpoint written; run the same" in said.err

    step = records(run)[-1][0]
    assert main([*command, "train.max_hours=0.0001"]) == 75  # a third of a second: while it starts
    assert "train.max_hours=0.0001 is over" in capsys.readouterr().err
    assert main(command) == 0
    assert f"resuming after step {step} " in capsys.readouterr().out
    assert is_the_same(run, alone)
    assert not (run / "checkpoints").exists(), "what only protected the work goes when the model is written"


def test_a_driver_that_gets_sigterm_and_30_seconds_later_sigkill_loses_nothing(folder, alone, capsys):
    run, command = folder / "runs" / "evicted", ["train", str(folder / "tiny.yaml"), "run.name=evicted"]
    address = f"scaling.address={ray.get_runtime_context().gcs_address}"
    with subprocess.Popen(
        [sys.executable, "-m", "raysft", *command, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=joining(),
    ) as process:
        alarm = threading.Timer(SECONDS, process.kill)
        alarm.start()
        assert process.stdout
        next(line for line in process.stdout if line.startswith("step 5/"))
        process.send_signal(signal.SIGTERM)
        kill = threading.Timer(GRACE_SECONDS, process.kill)
        kill.start()
        _, error = process.communicate()
        alarm.cancel()
        kill.cancel()
    assert process.returncode == 75, error
    step = records(run)[-1][0]
    assert f"raysft: stopped after step {step}: SIGTERM; checkpoint written; run the same command again" in error
    assert "Traceback" not in error
    assert main(command) == 0
    assert f"resuming after step {step} " in capsys.readouterr().out
    assert is_the_same(run, alone)
