"""A training that is killed again and again, against one that is left alone: ``python -m tests.faults``.

Trains a tiny model through the command line, in float32 on one worker. The process is killed (SIGKILL) at moments of each kind, and
the same command is given again until it is done; workers are killed, checkpoints damaged. At its end there is a table: what
happened, whether the training came to its end, rows that were lost or trained twice in what the log says, the largest difference of
a step's loss, and whether the trained weights are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors.numpy import load_file

from raysft.records import read_jsonl
from raysft.train.checkpoint import newest
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
  rows_per_step: 8
  learning_rate: 1.0e-2
  zero_stage: 2
  save_every_steps: 3
  eval_every_steps: 5
  trackers: []
scaling: {{threads_per_worker: 1, address: local}}
generate: {{enabled: false}}
"""
LIMIT_SECONDS = 180
"""Longer than any attempt takes; one that hangs is a fault that was not survived."""

Moment = Callable[[Path, float], bool]
"""(run directory, seconds since the start) → whether to kill now."""


@dataclass
class Outcome:
    """What became of a training with faults."""

    fault: str
    times: int
    survived: bool
    lost: int
    repeated: int
    difference: float
    same_weights: bool

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.fault:36} | {self.times:5} | {'yes' if self.survived else 'NO':8} | {self.lost:9} | {self.repeated:13} | "
            f"{self.difference:15.1e} | {'yes' if self.same_weights else 'NO'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the whole process, over all kinds (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parsed = parser.parse_args()
    draw = random.Random(parsed.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        reference = folder / "runs" / "left-alone"
        assert attempt(folder, "left-alone", None) == 0, "the training that is left alone failed"
        print(
            "fault                              | times | survived | rows lost | rows repeated | loss difference | weights"
        )
        outcomes = []
        kinds = moments(draw)
        each, more = divmod(parsed.kills, len(kinds))
        for number, (kind, make) in enumerate(kinds.items()):
            times = each + (number < more)
            if times:
                outcomes.append(killed(folder, reference, kind, [make() for _ in range(times)]))
                print(outcomes[-1].line(), flush=True)
        for kind, fault in (
            ("a worker is killed", kill_a_worker),
            ("a bit of a checkpoint flips", flip_a_bit),
            ("a checkpoint has lost a part", lose_a_part),
        ):
            outcomes.append(fault(folder, reference, kind, draw))
            print(outcomes[-1].line(), flush=True)
    return 0 if all(each.survived and each.same_weights and not each.lost + each.repeated for each in outcomes) else 1


def prepare(folder: Path) -> None:
    """A tiny model, conversations and the config."""
    tiny_model(folder / "base")
    write_chats(folder / "chat.jsonl", 600)
    (folder / "faults.yaml").write_text(CONFIG.format(folder=folder))


def moments(draw: random.Random) -> dict[str, Callable[[], Moment]]:
    """Kinds of moments to kill at, each as a maker of one at random."""

    def starting() -> Moment:
        at = draw.uniform(0.5, 12)
        return lambda run, seconds: seconds > at

    def within_a_step() -> Moment:
        step, later = draw.randint(1, 12), draw.uniform(0, 0.4)
        return after(lambda run: len(steps_of(run)) >= step, later)

    def within_a_checkpoint() -> Moment:
        return lambda run, seconds: any(
            not (part.parent / "part_0.json").exists()
            for part in run.glob("checkpoints/checkpoint_*/*part_0.safetensors*")
        )

    def while_evaluating() -> Moment:
        return lambda run, seconds: bool(steps := steps_of(run)) and steps[-1]["current_steps"] % 5 == 0

    def at_the_end_of_an_epoch() -> Moment:
        return lambda run, seconds: any(step["epoch"] >= 0.95 for step in steps_of(run))

    def writing_the_model() -> Moment:
        return lambda run, seconds: (run / ".model").exists() or (run / "model").exists()

    return {
        "killed while it starts": starting,
        "killed within a step": within_a_step,
        "killed while a checkpoint is written": within_a_checkpoint,
        "killed while it evaluates": while_evaluating,
        "killed at the end of an epoch": at_the_end_of_an_epoch,
        "killed while the model is written": writing_the_model,
    }


def after(begun: Callable[[Path], bool], later: float) -> Moment:
    """So many seconds after something was seen for the first time."""
    seen: list[float] = []

    def moment(run: Path, seconds: float) -> bool:
        if not seen and begun(run):
            seen.append(seconds)
        return bool(seen) and seconds >= seen[0] + later

    return moment


def attempt(folder: Path, name: str, moment: Moment | None) -> int | None:
    """Run the command; gives its exit code, None where it was killed.

    Raises:
        TimeoutError: it hangs.
    """
    command = [sys.executable, "-m", "raysft.cli", "train", str(folder / "faults.yaml"), f"run.name={name}"]
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    begun, run = time.monotonic(), folder / "runs" / name
    while process.poll() is None:
        seconds = time.monotonic() - begun
        if seconds > LIMIT_SECONDS or (moment and moment(run, seconds)):
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if seconds > LIMIT_SECONDS:
                raise TimeoutError(f"{name} hangs: {(folder / f'{name}.log').read_text()[-500:]}")
            # What it started ends by itself when it sees that, Ray's agents after a minute: they take no cores.
            psutil.wait_procs(children, timeout=10)
            return None
        time.sleep(0.01)
    return process.returncode


def killed(folder: Path, reference: Path, kind: str, wanted: list[Moment]) -> Outcome:
    """Kill a training at some moments, one in each attempt, and let it end."""
    name = kind.replace(" ", "-")
    times = 0
    code: int | None = None
    for moment in wanted:
        code = attempt(folder, name, moment)
        if code is not None:
            break  # it was done before the moment came
        times += 1
    while code is None:
        code = attempt(folder, name, None)
    return compared(folder, reference, name, kind, times, code)


def kill_a_worker(folder: Path, reference: Path, kind: str, draw: random.Random) -> Outcome:
    done: list[int] = []
    step = draw.randint(4, 8)

    def moment(run: Path, seconds: float) -> bool:
        if not done and len(steps_of(run)) >= step:
            for process in psutil.process_iter(["cmdline"]):
                if any("RayTrainWorker" in part for part in process.info["cmdline"] or ()):
                    process.kill()
                    done.append(process.pid)
        return False

    code = attempt(folder, "worker", moment)
    return compared(folder, reference, "worker", kind, len(done), code)


def flip_a_bit(folder: Path, reference: Path, kind: str, draw: random.Random) -> Outcome:
    def damage(checkpoint: Path) -> None:
        file = checkpoint / "part_0.safetensors"
        content = bytearray(file.read_bytes())
        content[-draw.randint(1, len(content) // 2)] ^= 1 << draw.randint(0, 7)
        file.write_bytes(bytes(content))

    return damaged(folder, reference, "flipped", kind, damage)


def lose_a_part(folder: Path, reference: Path, kind: str, draw: random.Random) -> Outcome:
    return damaged(folder, reference, "lost", kind, lambda checkpoint: (checkpoint / "part_0.safetensors").unlink())


def damaged(folder: Path, reference: Path, name: str, kind: str, damage: Callable[[Path], None]) -> Outcome:
    """Kill a training, damage the newest checkpoint, and let it end."""
    attempt(folder, name, after(lambda run: len(steps_of(run)) >= 8, 0.2))
    checkpoint = newest(folder / "runs" / name / "checkpoints")
    assert checkpoint
    assert checkpoint.local
    damage(checkpoint.local)
    return compared(folder, reference, name, kind, 1, attempt(folder, name, None))


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps in a run's log; of a line that is being written nothing."""
    try:
        return [record for record in read_jsonl(run / "trainer_log.jsonl") if "loss" in record]
    except (OSError, ValueError):
        return []


def compared(folder: Path, reference: Path, name: str, kind: str, times: int, code: int | None) -> Outcome:
    run = folder / "runs" / name
    expected = {step["current_steps"]: step for step in steps_of(reference)}
    found: dict[int, dict[str, Any]] = {}
    repeated = 0
    for step in steps_of(run):
        repeated += len(range(*_rows(step, expected))) if step["current_steps"] in found else 0
        found[step["current_steps"]] = step
    lost = sum(len(range(*_rows(step, expected))) for number, step in expected.items() if number not in found)
    differences = [abs(found[number]["loss"] - step["loss"]) for number, step in expected.items() if number in found]
    survived = code == 0
    return Outcome(
        kind, times, survived, lost, repeated, max(differences, default=0.0), survived and _same(run, reference)
    )


def _rows(step: dict[str, Any], steps: dict[int, dict[str, Any]]) -> tuple[int, int]:
    before = steps.get(step["current_steps"] - 1)
    return (before["rows"] if before else 0), step["rows"]


def _same(run: Path, reference: Path) -> bool:
    return all(np.array_equal(value, theirs) for value, theirs in _weights(run, reference))


def _weights(run: Path, reference: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, reference))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        yield value, theirs[name]


if __name__ == "__main__":
    sys.exit(main())
