"""The training log: what it writes, prints and passes to callbacks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from raysft.storage.json_files import read_jsonl
from raysft.telemetry.callback import Callback
from raysft.telemetry.events import (
    CheckpointCorrupt,
    CheckpointFailed,
    CheckpointSaved,
    EvaluationDone,
    Event,
    GenerationDone,
    GenerationNotice,
    PreemptionNotice,
    SetupDone,
    StepRecord,
    StepSkipped,
    StoppedEarly,
    TrainingEnded,
    TrainingStopped,
    Waiting,
    WorkerHangs,
    WorkersAlive,
    WorkerSlow,
    WorkersResized,
    WorkersRestarting,
)
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
        throughput_per_device=25.0,
    )


def set_up(at: int, log: list[dict[str, Any]] | None = None) -> SetupDone:
    return SetupDone(
        step=at,
        workers=1,
        model_seconds=1.0,
        data_wait_seconds=0.0,
        parameters=10,
        trained_parameters=1,
        log=log or [],
    )


EVENTS: dict[type, tuple[Event, str]] = {
    SetupDone: (set_up(3), "resuming after step 3 with 1 worker\nmodel: 0.0M parameters, 0.00M trainable (10.00%)"),
    StepRecord: (step(4), "step 4/9 | loss 1.0000 |"),
    StepSkipped: (StepSkipped(4, "the loss is nan"), "step 4 skipped: the loss is nan"),
    EvaluationDone: (
        EvaluationDone(
            {"current_steps": 4, "eval_loss": 1.5, "eval_perplexity": 4.48, "eval_accuracy": 0.25, "eval_tokens": 1200}
        ),
        "after step 4 | eval loss 1.5000 | perplexity 4.48 | token accuracy 25.0% | 1,200 loss tokens",
    ),
    GenerationDone: (
        GenerationDone({"current_steps": 4, "predict_examples": 8, "predict_chrf": 31.257, "predict_runtime": 2.5}),
        "after step 4 | chrf 31.26 | 8 examples in 2.5 s",
    ),
    GenerationNotice: (GenerationNotice(4, "an engine died"), "predictions after step 4: an engine died"),
    StoppedEarly: (
        StoppedEarly(6, "eval_loss", 4, 1.5),
        "stopped early after step 6: best eval_loss 1.5000 after step 4",
    ),
    CheckpointSaved: (CheckpointSaved(4, 16), "checkpoint after step 4"),
    CheckpointFailed: (CheckpointFailed(4, "disk full"), "no checkpoint after step 4: disk full"),
    CheckpointCorrupt: (CheckpointCorrupt("part_0 is corrupt"), "part_0 is corrupt; using the checkpoint before it"),
    Waiting: (Waiting("s3://x: waiting"), "s3://x: waiting"),
    WorkersRestarting: (WorkersRestarting("worker 1 failed"), "worker 1 failed; restarting the workers"),
    WorkersResized: (WorkersResized(2, 3), "3 workers now instead of 2"),
    PreemptionNotice: (PreemptionNotice(4, "node ab"), "after step 4: a machine will be preempted soon (node ab)"),
    WorkerSlow: (
        WorkerSlow(20, 1, "host", 1.4, "forward pass"),
        "worker 1 (host) is 1.4 times as slow as the others: forward",
    ),
    WorkersAlive: (WorkersAlive(20, "data"), ""),
    WorkerHangs: (WorkerHangs(1, 2, "host", 20, "data", 240, "", False), ""),
    TrainingStopped: (
        TrainingStopped(4, "its time is over", {"eval_loss": 1.5}),
        "stopped after step 4: its time is over",
    ),
    TrainingEnded: (TrainingEnded({"total_steps": 9}, {"eval_loss": 1.5}), ""),
}
"""One event of every class, and what the terminal must show for it."""


def test_a_note_stands_at_the_end_of_the_line_and_not_in_the_log(tmp_path: Path, capsys):
    record = EVENTS[EvaluationDone][0].record  # type: ignore[union-attr]
    for note in ("", "from the cache"):
        TrainLog(tmp_path / f"{note}.jsonl", Terminal())(EvaluationDone(record, note))
    computed, reused = capsys.readouterr().out.splitlines()
    assert reused == f"{computed} | from the cache"
    assert (tmp_path / ".jsonl").read_text() == (tmp_path / "from the cache.jsonl").read_text()


class Recording:
    """A callback with all documented methods."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("on_setup", "on_step", "on_evaluate", "on_generate", "on_checkpoint", "on_end"):
            raise AttributeError(name)
        return lambda argument: self.calls.append((name, argument))


def test_every_event_is_handled(tmp_path: Path, capsys):
    assert set(EVENTS) == set(get_args(Event))
    callback = Recording()
    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal(), [callback])
    for event, shown in EVENTS.values():
        log(event)
        printed = capsys.readouterr().out
        assert shown in printed
        assert shown or not printed
    with pytest.raises(AssertionError):
        log("step")  # type: ignore[arg-type]


def test_callbacks_get_a_record_of_each_step_and_plain_values_otherwise(tmp_path: Path, capsys):
    callback = Recording()
    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal(), [callback, Callback(), object()])
    for event, _ in EVENTS.values():
        log(event)
    calls = dict(callback.calls)
    assert list(calls) == [name for name in vars(Callback) if name.startswith("on_")]
    assert (calls["on_setup"]["step"], calls["on_setup"]["trained_parameters"]) == (3, 1)
    assert calls["on_step"] == step(4)
    assert calls["on_evaluate"]["eval_loss"] == 1.5
    assert calls["on_generate"]["predict_chrf"] == 31.257
    assert calls["on_checkpoint"] == {"step": 4, "rows": 16}
    assert calls["on_end"] == {"train": {"total_steps": 9}, "eval": {"eval_loss": 1.5}}


def test_what_a_killed_driver_did_not_write_comes_from_the_checkpoint(tmp_path: Path, capsys):
    log = tmp_path / "trainer_log.jsonl"
    first = TrainLog(log, Terminal())
    first(set_up(0))
    first(step(1))
    evaluation = {"current_steps": 2, "eval_loss": 3.0}
    known = [asdict(step(1)), asdict(step(2, loss=float("nan"))), evaluation]
    callback = Recording()
    again = TrainLog(log, Terminal(), [callback])
    again(set_up(2, known))
    again(step(3))
    found = list(read_jsonl(log))
    assert [(record["current_steps"], record.get("loss", "evaluation")) for record in found] == [
        (1, 1.0),
        (2, None),
        (2, "evaluation"),
        (3, 1.0),
    ]
    assert "resuming after step 2" in capsys.readouterr().out
    assert callback.calls[0][1]["log"] == found[:3]


def test_a_log_has_each_step_once_and_results_count_all_of_them(tmp_path: Path, capsys):
    log = tmp_path / "trainer_log.jsonl"
    first = TrainLog(log, Terminal())
    first(set_up(0))
    for number in (1, 2, 3, 4):
        first(step(number, loss=number))
    with log.open("a") as file:
        file.write('{"current_steps": 5, "lo')  # killed in the middle of a line
    again = TrainLog(log, Terminal())
    again(set_up(2))
    for number in (3, 4, 5):
        again(step(number, loss=10.0))
    assert [record["current_steps"] for record in read_jsonl(log)] == [1, 2, 3, 4, 5]
    assert again.results(35) == {
        "train_loss": (1 + 2 + 10 + 10 + 10) / 5,
        "train_runtime": 10.0,
        "train_steps_per_second": 0.5,
        "train_samples_per_second": 3.5,
        "train_tokens_per_second": 50.0,
        "effective_tokens_per_sec": 25.0,
    }


def test_results_are_json_where_a_loss_was_not_finite(tmp_path: Path, capsys):
    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal())
    log(set_up(0))
    log(step(1, loss=float("nan")))
    assert log.results(1) == {}
    log(step(2, loss=2.0))
    assert json.loads(json.dumps(log.results(1), allow_nan=False))["train_loss"] == 2.0


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
    log = TrainLog(tmp_path / "log.jsonl", Terminal())
    for _ in range(3):
        log(Waiting("s3://x: waiting for the storage"))
        log(CheckpointFailed(4, "full"))
    log(CheckpointFailed(6, "busy", skipped=True))
    log(CheckpointFailed(6, "full"))
    assert capsys.readouterr().out.splitlines() == [
        "s3://x: waiting for the storage",
        "no checkpoint after step 4: full; training continues, older checkpoints are kept",
        "no checkpoint after step 6: busy; training continues, older checkpoints are kept",
        "no checkpoint after step 6: full; training continues, older checkpoints are kept",
    ]


def test_predictions_are_logged_once_and_those_of_steps_that_are_repeated_are_logged_again(tmp_path, capsys):
    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal())
    record = {"current_steps": 2, "predict_examples": 8, "predict_chrf": 31.0}
    evaluation = {"current_steps": 2, "eval_loss": 1.5}
    log(step(1))
    log(step(2))
    log(GenerationDone(record))
    log(set_up(2, [asdict(step(1)), asdict(step(2)), evaluation]))  # the driver died before it wrote the evaluation
    log(GenerationDone(record))  # and before it removed the model
    records = list(read_jsonl(tmp_path / "trainer_log.jsonl"))
    assert [each["current_steps"] for each in records] == [1, 2, 2, 2]
    assert [record, evaluation] == records[2:]
    log(set_up(1))
    log(step(2))
    log(GenerationDone({**record, "predict_chrf": 32.0}))
    records = list(read_jsonl(tmp_path / "trainer_log.jsonl"))
    assert [each.get("predict_chrf") for each in records] == [None, None, 32.0]


def test_scores_with_other_settings_replace_those_of_the_same_step(tmp_path, capsys):
    class Scores(Callback):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def on_generate(self, results: Any) -> None:
            self.heard.append(results["predict_examples"])

    scores = Scores()
    log = TrainLog(tmp_path / "trainer_log.jsonl", Terminal(), [scores])
    log(step(1))
    log(GenerationDone({"current_steps": 1, "predict_examples": 4, "predict_f1": math.nan}))
    log(step(2))
    for examples in (8, 8, 6, 6):
        log(GenerationDone({"current_steps": 2, "predict_examples": examples, "predict_f1": math.nan}))
    records = list(read_jsonl(tmp_path / "trainer_log.jsonl"))
    assert [(each["current_steps"], each.get("predict_examples")) for each in records] == [
        (1, None),
        (1, 4),
        (2, None),
        (2, 6),
    ]
    assert scores.heard == [4, 8, 6]
    assert capsys.readouterr().out.count("after step 2 |") == 2
