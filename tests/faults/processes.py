"""Processes that are killed with SIGKILL at moments of each kind, and checkpoints that are damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import psutil

from raysft.train.checkpoint.catalog import newest
from tests.faults.runs import Moment, Outcome, after, attempt, compared, steps_of, together


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


TRAININGS = 5
"""So many are begun, for a kind of moment that some of them do not come to, before it is given up."""


def killed(folder: Path, reference: str, kind: str, wanted: list[Moment]) -> Outcome:
    """Kill a training at some moments, one in each attempt, and let it end; what it did not come to happens to another one."""
    outcomes: list[Outcome] = []
    while len(outcomes) < TRAININGS and (times := sum(outcome.times for outcome in outcomes)) < len(wanted):
        name = f"{kind.replace(' ', '-')}-{len(outcomes)}"
        outcomes.append(_killed(folder, reference, name, kind, wanted[times:]))
    return together(outcomes)


def _killed(folder: Path, reference: str, name: str, kind: str, wanted: list[Moment]) -> Outcome:
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


def kill_a_worker(folder: Path, reference: str, kind: str, draw: random.Random) -> Outcome:
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


def flip_a_bit(folder: Path, reference: str, kind: str, draw: random.Random) -> Outcome:
    def damage(checkpoint: Path) -> None:
        file = checkpoint / "part_0.safetensors"
        content = bytearray(file.read_bytes())
        content[-draw.randint(1, len(content) // 2)] ^= 1 << draw.randint(0, 7)
        file.write_bytes(bytes(content))

    return damaged(folder, reference, "flipped", kind, damage)


def lose_a_part(folder: Path, reference: str, kind: str, draw: random.Random) -> Outcome:
    return damaged(folder, reference, "lost", kind, lambda checkpoint: (checkpoint / "part_0.safetensors").unlink())


def damaged(folder: Path, reference: str, name: str, kind: str, damage: Callable[[Path], None]) -> Outcome:
    """Kill a training, damage the newest checkpoint, and let it end."""
    attempt(folder, name, after(lambda run: len(steps_of(run)) >= 8, 0.2))
    checkpoint = newest(folder / "runs" / name / "checkpoints")
    assert checkpoint
    assert checkpoint.path.local
    damage(checkpoint.path.local)
    return compared(folder, reference, name, kind, 1, attempt(folder, name, None))
