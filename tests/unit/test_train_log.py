"""What is logged and shown, whatever becomes of the one who reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from raysft.storage.json_files import read_jsonl
from raysft.telemetry.events import StepRecord
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.train_log import TrainLog


def step(number: int, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        current_steps=number,
        total_steps=9,
        loss=loss,
        lr=0.1,
        grad_norm=1.0,
        epoch=0.1,
        percentage=1.0,
        elapsed_time="0",
        remaining_time="0",
        throughput=1.0,
        total_tokens=100 * number,
        loss_tokens=50,
        packing_efficiency=1.0,
        rows=number,
        step_seconds=2.0,
        data_wait_seconds=0.0,
        memory_gib=1.0,
        memory_total_gib=2.0,
    )


def set_up(at: int) -> dict:
    return {
        "step": at,
        "workers": 1,
        "model_seconds": 1.0,
        "data_wait_seconds": 0.0,
        "parameters": 10,
        "trained_parameters": 1,
    }


def test_what_a_killed_driver_did_not_write_comes_from_the_checkpoint(tmp_path: Path, capsys):
    log = tmp_path / "trainer_log.jsonl"
    first = TrainLog(log, Terminal())
    first("setup", set_up(0))
    first("step", step(1))
    evaluation = {"current_steps": 2, "eval_loss": 3.0}
    known = [asdict(step(1)), asdict(step(2, loss=float("nan"))), evaluation]
    again = TrainLog(log, Terminal())
    again("setup", {**set_up(2), "log": known})
    again("step", step(3))
    found = list(read_jsonl(log))
    assert [(record["current_steps"], record.get("loss", "evaluation")) for record in found] == [
        (1, 1.0),
        (2, None),
        (2, "evaluation"),
        (3, 1.0),
    ]
    assert "going on after step 2" in capsys.readouterr().out


def test_a_log_has_each_step_once_and_results_count_all_of_them(tmp_path: Path, capsys):
    log = tmp_path / "trainer_log.jsonl"
    first = TrainLog(log, Terminal())
    first("setup", set_up(0))
    for number in (1, 2, 3, 4):
        first("step", step(number, loss=number))
    with log.open("a") as file:
        file.write('{"current_steps": 5, "lo')  # killed in the middle of a line
    again = TrainLog(log, Terminal())
    again("setup", set_up(2))
    for number in (3, 4, 5):
        again("step", step(number, loss=10.0))
    assert [record["current_steps"] for record in read_jsonl(log)] == [1, 2, 3, 4, 5]
    assert again.results() == {
        "train_loss": (1 + 2 + 10 + 10 + 10) / 5,
        "train_runtime": 10.0,
        "train_steps_per_second": 0.5,
        "train_tokens_per_second": 50.0,
    }


def test_results_are_json_where_a_loss_was_not_finite(tmp_path: Path, capsys):
    journal = TrainLog(tmp_path / "trainer_log.jsonl", Terminal())
    journal("setup", set_up(0))
    journal("step", step(1, loss=float("nan")))
    assert journal.results() == {}
    journal("step", step(2, loss=2.0))
    assert json.loads(json.dumps(journal.results(), allow_nan=False))["train_loss"] == 2.0


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path):
    code = (
        "import time, pathlib\nfrom raysft.telemetry.terminal import Terminal\nterminal = Terminal()\n"
        "for number in range(200):\n    terminal.line('x' * 1000)\n    time.sleep(0.001)\n"
        f"pathlib.Path({str(tmp_path / 'done')!r}).touch()\n"
    )
    command = f'"{sys.executable}" -c "$CODE" | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], check=False, env={"CODE": code, "PATH": "/usr/bin:/bin"}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "done").exists()


def test_a_storage_that_fails_for_many_workers_is_said_once(tmp_path, capsys):
    journal = TrainLog(tmp_path / "log.jsonl", Terminal())
    for _ in range(3):
        journal("waiting", "s3://x: waiting for the storage")
        journal("unsaved", {"step": 4, "reason": "full", "left_out": False})
    journal("unsaved", {"step": 6, "reason": "busy", "left_out": True})
    journal("unsaved", {"step": 6, "reason": "full", "left_out": False})
    assert capsys.readouterr().out.splitlines() == [
        "s3://x: waiting for the storage",
        "no checkpoint after step 4: full; the training goes on, and older ones stay",
        "no checkpoint after step 6: busy; the training goes on, and older ones stay",
        "no checkpoint after step 6: full; the training goes on, and older ones stay",
    ]
