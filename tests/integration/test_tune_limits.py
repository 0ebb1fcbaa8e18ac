"""A sweep that runs out of time, is asked to stop, loses a process, and keeps one model; on a local Ray cluster of 2 CPUs, with a
tiny model.

Each call of ``raysft tune`` goes on with what the one before has left.
"""

import io
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from raysft.cli import main
from raysft.storage.json_files import read_jsonl
from raysft.tune import abandoned
from raysft.tune.record import Record, TrialRecord
from tests.processes import children_named
from tests.sweeps import write_sweep

STEPS = 60
"""Enough that something can happen to a trial while it trains."""
RATES = [1.0e-5, 1.0e-2, 1.0e-6]
"""The second one is the best."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    write_sweep(folder, RATES, 60, {"max_steps": STEPS, "epochs": 20, "save_every_steps": 10}, {"enabled": False})
    return folder


@dataclass
class Call:
    """What came of a call of the sweep."""

    sweep: Path
    code: int
    out: str
    err: str
    trials: dict[float, TrialRecord]
    """The last record of each trial, by its learning rate."""
    logs: dict[float, list[dict]]
    """What each trial has logged of its steps."""
    files: set[str]
    """In the sweep's directory."""


def called(folder: Path, *overrides: str, meanwhile: Callable[[Path], None] = lambda sweep: None) -> Call:
    """Call the sweep, while a function runs beside it."""
    sweep, out, err = folder / "runs" / "sweep", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as executor:
        patch.chdir(folder)
        with redirect_stdout(out), redirect_stderr(err):
            beside = executor.submit(meanwhile, sweep)
            code = main(["tune", "sweep.yaml", "tune.keep=best", "tune.max_failures=1", *overrides])
            beside.result()
    records = Record(sweep / "trials.jsonl").read().values()
    trials = {record.values["train.learning_rate"]: record for record in records}
    logs = {rate: steps_of(sweep / "trials" / record.trial) for rate, record in trials.items()}
    return Call(sweep, code, out.getvalue(), err.getvalue(), trials, logs, {path.name for path in sweep.iterdir()})


def steps_of(run: Path) -> list[dict]:
    log = run / "trainer_log.jsonl"
    return [line for line in read_jsonl(log) if "loss" in line] if log.exists() else []


def numbers(steps: list[dict]) -> list[int]:
    return [step["current_steps"] for step in steps]


def await_steps(sweep: Path, count: int) -> None:
    """Wait until a trial has trained so many steps."""
    limit = time.monotonic() + 120
    while not any(len(steps_of(trial)) >= count for trial in (sweep / "trials").glob("*")):
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def out_of_time(local_ray, folder) -> Call:
    return called(folder, "tune.max_minutes=0.0001")


@pytest.fixture(scope="module")
def asked(folder, out_of_time) -> Call:
    """Asked to stop in its first trial, which saves no checkpoint unless it is asked to stop."""

    def ask(sweep: Path) -> None:
        await_steps(sweep, 3)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # if it comes too late
    try:
        return called(folder, "train.save_every_steps=null", meanwhile=ask)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def gone_on(folder, asked) -> Call:
    """Goes on to its end, and the process of its first trial is killed on the way."""

    def kill(sweep: Path) -> None:
        await_steps(sweep, min(max(map(len, asked.logs.values())) + 3, STEPS))
        next(children_named("Trainable")).kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abandoned, "EMPTY_SECONDS", 3.0)
        return called(folder, meanwhile=kill)


def test_a_sweep_whose_time_is_over_says_what_is_left(out_of_time):
    assert out_of_time.code == 1
    assert "tune.max_minutes=0.0001 is over, and 3 of 3 trials have not ended; run the same command" in out_of_time.out
    assert "no trial has ended" in out_of_time.err
    assert not {"best.yaml", "best_model"} & out_of_time.files


def test_a_sweep_that_is_asked_to_stop_ends_its_trial_with_a_checkpoint(asked):
    assert asked.code == 75
    assert asked.err == "raysft: stopped: SIGTERM; 3 of 3 trials have not ended; run the same command again to resume\n"
    (only,), (steps,) = asked.trials.values(), asked.logs.values()
    assert only.state == "interrupted"
    assert only.reason == f"stopped after step {len(steps)}: SIGTERM; checkpoint written"
    assert 3 <= len(steps) < STEPS


def test_a_sweep_goes_on_where_it_stopped(asked, gone_on):
    assert gone_on.code == 0
    assert [record.state for record in gone_on.trials.values()] == ["done"] * 3
    (steps,) = asked.logs.values()
    assert gone_on.logs[1e-5][: len(steps)] == steps, "it goes on with the next step"
    assert numbers(gone_on.logs[1e-5]) == list(range(1, STEPS + 1))


def test_a_trial_whose_process_is_killed_starts_again_and_nothing_of_it_holds_cpus(gone_on):
    """Two trials' workers do not fit beside each other, so that what a dead trial holds would end the next one."""
    (line,) = [line for line in gone_on.out.splitlines() if "failed, and restarts" in line]
    assert "| the trial's process died (it was killed, " in line
    for steps in gone_on.logs.values():
        assert numbers(steps) == list(range(1, STEPS + 1))
    killed = gone_on.trials[1e-5].trial
    states = [line["state"] for line in read_jsonl(gone_on.sweep / "trials.jsonl") if line["trial"] == killed]
    assert states.count("done") == 1


def test_only_the_best_model_is_kept(gone_on, folder):
    sweep, found = gone_on.sweep, gone_on.trials
    # Of the others nothing is left that takes room.
    best = found[1e-2].trial
    assert f"best model: {sweep / 'best_model'}" in gone_on.out
    for record in found.values():
        trial = sweep / "trials" / record.trial
        kept = {name for name in ("model", "checkpoints") if (trial / name).exists()}
        assert kept == ({"model", "checkpoints"} if record.trial == best else set())
        assert (trial / "all_results.json").exists()
    copy, model = (place / "model.safetensors" for place in (sweep / "best_model", sweep / "trials" / best / "model"))
    assert not (sweep / "best_model").is_symlink()
    assert copy.read_bytes() == model.read_bytes()
    # A sweep that has ended does nothing more, and the model becomes a link.
    again = called(folder, "tune.keep=all")
    assert again.code == 0
    assert "3 done before" in again.out
    assert (sweep / "best_model").is_symlink()
    assert (sweep / "best_model" / "model.safetensors").read_bytes() == model.read_bytes()
    # The best one of another space is kept, even if it is worse than the best one of this space.
    other = called(folder, "tune.space={train.learning_rate: [1.0e-7]}")
    assert other.code == 0
    assert other.trials[1e-7].metrics["eval_loss"] > other.trials[1e-2].metrics["eval_loss"]
    model = sweep / "trials" / other.trials[1e-7].trial / "model" / "model.safetensors"
    assert copy.read_bytes() == model.read_bytes()
