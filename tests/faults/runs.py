"""Trainings of a tiny model through the command line, with something that happens to them, and what became of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from raysft.data.shards.ray_pipeline import LOCAL_BYTES
from raysft.storage.json_files import read_jsonl
from tests.tiny import tiny_model, write_chats

CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, dtype: float32, finetuning: full}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
train:
  epochs: 2
  global_batch_size: 8
  learning_rate: 1.0e-2
  zero_stage: 2
  save_every_steps: 3
  eval_every_steps: 5
  trackers: []
scaling: {{threads_per_worker: 1, address: local}}
generate: {{enabled: false, compare_base: false, max_new_tokens: 200, do_sample: false, batch_size: 2}}
"""
LIMIT_SECONDS = 240
"""Longer than any attempt takes; one that hangs is a fault that was not survived."""
CLOSE = 1e-4
"""How far losses and weights may be from those left alone where the number of workers changes; 0 is bit for bit."""

Moment = Callable[[Path, float], bool]
"""(run directory, seconds since the start) → whether to kill now; it may do something else instead."""


@dataclass
class Outcome:
    """What became of a training with faults."""

    fault: str
    times: int
    survived: bool
    lost: int
    repeated: int
    losses: float
    """The largest difference of a step's loss."""
    weights: float
    """The largest difference of a trained weight; of a generation the share of predictions that differ."""
    exact: bool = True
    """Whether nothing at all may differ."""

    @property
    def good(self) -> bool:
        """Whether it is what is promised."""
        allowed = 0.0 if self.exact else CLOSE
        return self.survived and not self.lost + self.repeated and max(self.losses, self.weights) <= allowed

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.fault:44} | {self.times:5} | {'yes' if self.survived else 'NO':8} | {self.lost:9} | "
            f"{self.repeated:13} | {self.losses:15.1e} | {self.weights:18.1e} | {'yes' if self.good else 'NO'}"
        )


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several trainings with one kind of fault as one: times and rows added up, the largest differences."""
    return Outcome(
        outcomes[0].fault,
        sum(outcome.times for outcome in outcomes),
        all(outcome.survived for outcome in outcomes),
        sum(outcome.lost for outcome in outcomes),
        sum(outcome.repeated for outcome in outcomes),
        max(outcome.losses for outcome in outcomes),
        max(outcome.weights for outcome in outcomes),
        all(outcome.exact for outcome in outcomes),
    )


TITLE = (
    f"{'fault':44} | times | survived | rows lost | rows repeated | loss difference | weights difference | as promised"
)


def prepare(folder: Path, conversations: int = 600, large: bool = False) -> None:
    """A tiny model, conversations and the config.

    Args:
        large: make the data too large to be tokenized in the driver, where no node or task can die.
    """
    tiny_model(folder / "base")
    write_chats(folder / "chat.jsonl", conversations)
    if large:  # by spaces that JSON ignores
        lines = (folder / "chat.jsonl").read_text().splitlines()
        (folder / "chat.jsonl").write_text("\n".join(line.ljust(2 * LOCAL_BYTES // len(lines)) for line in lines))
    (folder / "faults.yaml").write_text(CONFIG.format(folder=folder))


def after(begun: Callable[[Path], bool], later: float) -> Moment:
    """So many seconds after something was seen for the first time."""
    seen: list[float] = []

    def moment(run: Path, seconds: float) -> bool:
        if not seen and begun(run):
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + later

    return moment


def attempt(
    folder: Path, name: str, moment: Moment | None, *settings: str, verb: str = "train", home: Path | None = None
) -> int | None:
    """Run the command, with a home folder of its own; gives its exit code, None where it was killed.

    Raises:
        TimeoutError: it hangs.
    """
    command = [sys.executable, "-m", "raysft", verb, str(folder / "faults.yaml"), f"run.name={name}", *settings]
    with (folder / f"{name}.log").open("a") as log:
        environment = {**os.environ, "HOME": str(home)} if home else None
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    begun, run = time.monotonic(), folder / "runs" / name
    while process.poll() is None:
        seconds = time.monotonic() - begun
        if seconds > LIMIT_SECONDS or (moment and moment(run, seconds)):
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if seconds > LIMIT_SECONDS:
                raise TimeoutError(f"{name} hangs: {said(folder, name)[-500:]}")
            # What it started ends by itself when it sees that, Ray's agents after a minute: they take no cores.
            psutil.wait_procs(children, timeout=10)
            return None
        time.sleep(0.01)
    return process.returncode


def said(folder: Path, name: str) -> str:
    """What a training has printed so far, in all its attempts."""
    return (folder / f"{name}.log").read_text()


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps in a run's log; of a line that is being written nothing."""
    try:
        return [record for record in read_jsonl(run / "trainer_log.jsonl") if "loss" in record]
    except (OSError, ValueError):
        return []


def compared(
    folder: Path, reference: str, name: str, fault: str, times: int, code: int | None, exact: bool = True
) -> Outcome:
    """What a training came to, beside the one that was left alone."""
    run, other = folder / "runs" / name, folder / "runs" / reference
    expected = {step["current_steps"]: step for step in steps_of(other)}
    found: dict[int, dict[str, Any]] = {}
    repeated = 0
    for step in steps_of(run):
        repeated += len(range(*_rows(step, expected))) if step["current_steps"] in found else 0
        found[step["current_steps"]] = step
    lost = sum(len(range(*_rows(step, expected))) for number, step in expected.items() if number not in found)
    differences = [abs(found[number]["loss"] - step["loss"]) for number, step in expected.items() if number in found]
    differing = max((float(np.abs(a - b).max()) for a, b in _weights(run, other)), default=0.0) if code == 0 else 1.0
    return Outcome(fault, times, code == 0, lost, repeated, max(differences, default=0.0), differing, exact)


def _rows(step: dict[str, Any], steps: dict[int, dict[str, Any]]) -> tuple[int, int]:
    before = steps.get(step["current_steps"] - 1)
    return (before["rows"] if before else 0), step["rows"]


def _weights(run: Path, reference: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, reference))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        yield value, theirs[name]
