"""Sweeps that run out of time, keep one model only, or lose a process; on a local Ray cluster of 2 CPUs, with a tiny model."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raysft.cli import main
from raysft.storage.json_files import read_jsonl
from raysft.tune import abandoned
from raysft.tune.record import Record, TrialRecord
from tests.processes import children_named
from tests.sweeps import write_sweep

STEPS = 12
RATES = [1.0e-5, 1.0e-2, 1.0e-6]
"""The second one is the best."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("limits")
    write_sweep(folder, RATES, 60, {"max_steps": STEPS, "save_every_steps": 1}, {"enabled": False})
    return folder


@pytest.fixture(autouse=True)
def _in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)


def recorded(run: Path) -> dict[float, TrialRecord]:
    """The last record of each trial, by its learning rate."""
    return {record.values["train.learning_rate"]: record for record in Record(run / "trials.jsonl").read().values()}


def steps_of(run: Path) -> list[int]:
    log = run / "trainer_log.jsonl"
    return [line["current_steps"] for line in read_jsonl(log) if "loss" in line] if log.exists() else []


def test_a_sweep_that_is_asked_to_stop_ends_its_trial_with_a_checkpoint_and_goes_on(local_ray, folder, capsys):
    arguments = ["tune", "sweep.yaml", "run.name=asked", "train.max_steps=200", "train.epochs=50"]
    arguments += ["train.save_every_steps=null"]
    sweep = folder / "runs" / "asked"
    trials = sweep / "trials"

    def ask_in_the_first() -> None:
        limit = time.monotonic() + 120
        while not any(len(steps_of(trial)) >= 3 for trial in trials.glob("*")):
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # if it comes too late
    try:
        with ThreadPoolExecutor(1) as executor:
            asking = executor.submit(ask_in_the_first)
            assert main(arguments) == 75
            asking.result()
    finally:
        signal.signal(signal.SIGTERM, before)
    said = capsys.readouterr().err
    assert said == "raysft: stopped: SIGTERM; 3 of 3 trials have not ended; run the same command again to go on\n"
    (only,) = recorded(sweep).values()
    done = len(steps_of(trials / only.trial))
    assert only.state == "interrupted"
    assert only.reason == f"stopped after step {done}: SIGTERM; checkpoint written"
    assert 3 <= done < 200
    assert main([*arguments, "tune.space={train.learning_rate: [1.0e-5]}"]) == 0
    (run,) = trials.iterdir()
    assert steps_of(run) == list(range(1, 201)), "it goes on with the next step"


def test_a_sweep_whose_time_is_over_goes_on_when_it_is_started_again(local_ray, folder, capsys):
    arguments = ["tune", "sweep.yaml", "run.name=timed", "tune.keep=best"]
    sweep = folder / "runs" / "timed"
    assert main([*arguments, "tune.max_minutes=0.0001"]) == 1
    printed = capsys.readouterr()
    assert "tune.max_minutes=0.0001 is over, and 3 of 3 trials have not ended; start the same command" in printed.out
    assert "no trial has ended" in printed.err
    assert not any((sweep / name).exists() for name in ("best.yaml", "best_model"))
    assert main(arguments) == 0
    found = recorded(sweep)
    assert [record.state for record in found.values()] == ["done"] * 3
    # Of the others nothing is left that takes room.
    best = found[1e-2].trial
    assert f"best model: {sweep / 'best_model'}" in capsys.readouterr().out
    for record in found.values():
        trial = sweep / "trials" / record.trial
        kept = {name for name in ("model", "checkpoints") if (trial / name).exists()}
        assert kept == ({"model", "checkpoints"} if record.trial == best else set())
        assert (trial / "all_results.json").exists()
    copy, model = (place / "model.safetensors" for place in (sweep / "best_model", sweep / "trials" / best / "model"))
    assert not (sweep / "best_model").is_symlink()
    assert copy.read_bytes() == model.read_bytes()
    # A sweep that has ended does nothing more, and the model becomes a link.
    assert main(["tune", "sweep.yaml", "run.name=timed"]) == 0
    assert "3 done before" in capsys.readouterr().out
    assert (sweep / "best_model").is_symlink()
    assert (sweep / "best_model" / "model.safetensors").read_bytes() == model.read_bytes()
    # The best one of another space is kept, even if it is worse than the best one of this space.
    assert main([*arguments, "tune.space={train.learning_rate: [1.0e-7]}"]) == 0
    found = recorded(sweep)
    assert found[1e-7].metrics["eval_loss"] > found[1e-2].metrics["eval_loss"]
    model = sweep / "trials" / found[1e-7].trial / "model" / "model.safetensors"
    assert copy.read_bytes() == model.read_bytes()


def test_a_trial_whose_process_is_killed_starts_again_and_nothing_of_it_holds_cpus(
    local_ray, folder, capsys, monkeypatch
):
    """Two trials' workers do not fit beside each other, so that what a dead trial holds would end the next one."""
    monkeypatch.setattr(abandoned, "EMPTY_SECONDS", 3.0)
    sweep = folder / "runs" / "killed"

    def kill_the_first() -> None:
        limit = time.monotonic() + 120
        while not any(len(steps_of(trial)) >= 3 for trial in (sweep / "trials").glob("*")):
            assert time.monotonic() < limit
            time.sleep(0.02)
        next(children_named("Trainable")).kill()

    with ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_the_first)
        rates = "tune.space={train.learning_rate: [1.0e-5, 1.0e-2]}"
        steps = ["train.max_steps=60", "train.epochs=20"]
        code = main(["tune", "sweep.yaml", "run.name=killed", "tune.max_failures=1", rates, *steps])
        killer.result()
    assert code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "failed, and starts again" in line]
    assert "| the trial's process died (it was killed, " in line
    found = recorded(sweep)
    assert [record.state for record in found.values()] == ["done"] * 2
    for record in found.values():
        assert steps_of(sweep / "trials" / record.trial) == list(range(1, 61))
    states = [line["state"] for line in read_jsonl(sweep / "trials.jsonl") if line["trial"] == found[1e-5].trial]
    assert states.count("done") == 1
