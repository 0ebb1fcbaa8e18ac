"""The training log: handles the workers' events in the driver, writes ``trainer_log.jsonl`` and prints progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, assert_never

import psutil

from raysft.storage.json_files import append_json, write_atomically
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
from raysft.telemetry.hangs import Hangs
from raysft.telemetry.terminal import Terminal

WAITING_SECONDS = 5.0
"""Least time between two printed ``Waiting`` messages: a thousand workers may wait for the same storage."""


_OPTIONAL = ("mfu", "router_aux_loss")
"""Fields of a step that may be None."""
_FACTS = ("examples", "unscored", "runtime", "samples_per_second", "tokens_per_second")
"""What ``predict_results.json`` says besides scores."""


def evaluation_line(results: Mapping[str, Any]) -> str:
    """Format evaluation results as one line."""
    return (
        f"eval loss {results['eval_loss']:.4f} | perplexity {results['eval_perplexity']:.2f} | "
        f"token accuracy {100 * results['eval_accuracy']:.1f}% | {results['eval_tokens']:,} loss tokens"
    )


def generation_line(results: Mapping[str, Any]) -> str:
    """Format the scores of predictions over all sources as one line.

    >>> scores = {"predict_rouge-1": 31.257, "predict_rouge-1_low": 30.0, "predict_rouge-1_high": 33.0}
    >>> facts = {"predict_examples": 8, "predict_runtime": 2.5, "predict_samples_per_second": 3.2}
    >>> generation_line({**scores, **facts, "predict_a_examples": 4, "predict_a_bleu": 3.0})
    'rouge-1 31.26 | 8 examples in 2.5 s'
    """
    found = {key.removeprefix("predict_"): value for key, value in results.items() if key.startswith("predict_")}
    sources = tuple(f"{key.removesuffix('_examples')}_" for key in found if key.endswith("_examples"))
    left_out = {f"{key}_{end}" for key in found for end in ("low", "high")} | {*_FACTS}
    scores = [
        f"{key} {value:.4g}"
        for key, value in found.items()
        if key not in left_out and not key.startswith(sources) and isinstance(value, int | float)
    ]
    return " | ".join([*scores, f"{found.get('examples', 0):,} examples in {found.get('runtime') or 0:.3g} s"])


def progress_line(record: Mapping[str, Any]) -> str:
    """Format a line of ``trainer_log.jsonl`` as the run prints it."""
    if _kind(record) == "generation":
        return f"after step {record['current_steps']} | {generation_line(record)}"
    if "eval_loss" in record:
        return f"after step {record['current_steps']} | {evaluation_line(record)}"
    known = {one.name for one in fields(StepRecord)}
    # JSON has no NaN, which is null there.
    values: dict[str, Any] = {
        key: math.nan if value is None and key not in _OPTIONAL else value
        for key, value in record.items()
        if key in known
    }
    return StepRecord(**values).line()


def _kind(record: Mapping[str, Any]) -> str:
    """What a line of ``trainer_log.jsonl`` is about."""
    if "loss" in record:
        return "step"
    return "generation" if any(key.startswith("predict_") for key in record) else "evaluation"


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """The results of predictions in a line of ``trainer_log.jsonl``."""
    return {key: value for key, value in record.items() if key.startswith("predict_")}


def _json_line(record: Mapping[str, Any]) -> str:
    # JSON has no infinity or NaN: many readers would reject the whole file.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


class TrainLog:
    """Handles events in the driver: writes the log file, prints lines, calls callbacks, and times the start."""

    def __init__(self, log: Path, terminal: Terminal, callbacks: Sequence[Any] = (), stacks: str = "") -> None:
        """
        Args:
            log: ``trainer_log.jsonl``; a resumed run appends to it from the checkpoint's step on.
            terminal: prints the lines.
            callbacks: objects with any of the methods ``on_setup(setup)``, ``on_step(record)``, ``on_evaluate(results)``,
                ``on_generate(results)``, ``on_checkpoint(cursor)`` and ``on_end(results)``. ``on_step`` gets a ``StepRecord``, the
                others a dict. ``setup`` has as ``log`` all records up to its step: some of them came when no callback lived.
            stacks: folder of the stacks of workers that make no progress, for messages.
        """
        self._log, self._terminal, self._callbacks = log, terminal, callbacks
        self._hangs = Hangs(self._find, stacks)
        self._launched = time.time()
        self._setup: SetupDone | None = None
        self._setup_time = 0.0
        self._last_failed: tuple[int, bool] | None = None
        """Step and ``skipped`` of the last ``CheckpointFailed`` that was printed."""
        self._last_waiting = 0.0
        """Time at which a ``Waiting`` message was last printed."""
        self.timings: dict[str, float] = {}
        """Seconds of each phase up to the first step; empty until that step is done."""

    def __call__(self, event: Event) -> None:
        """Handle one event."""
        match event:
            case SetupDone():
                self._set_up(event)
                self._call("on_setup", {**asdict(event), "log": self._records()})
            case StepRecord():
                self._step(event)
                self._call("on_step", event)
            case EvaluationDone(record, note):
                self._print(f"after step {record['current_steps']} | {evaluation_line(record)}{note and f' | {note}'}")
                self._append(record)
                self._call("on_evaluate", record)
            case GenerationDone(record):
                self._generated(record)
            case GenerationNotice(step, message):
                self._print(f"predictions after step {step}: {message}")
            case CheckpointSaved(step):
                self._print(f"checkpoint after step {step}")
                self._call("on_checkpoint", asdict(event))
            case CheckpointFailed():
                self._checkpoint_failed(event)
            case CheckpointCorrupt(reason):
                self._print(f"{reason}; using the checkpoint before it")
            case StepSkipped(step, reason):
                self._print(f"step {step} skipped: {reason}")
            case StoppedEarly(step, metric, best_step, value):
                best = f"no finite {metric}" if value is None else f"best {metric} {value:.4f} after step {best_step}"
                self._print(f"stopped early after step {step}: {best}")
            case Waiting(message, worker):
                self._wait(f"{worker}: {message}" if worker else message)
            case WorkersRestarting(reason):
                self._print(f"{reason}; restarting the workers")
            case WorkersResized(before, after):
                self._print(f"the cluster can place {after} workers now instead of {before}; restarting with {after}")
            case PreemptionNotice(step, reason):
                shown = f" ({reason})" if reason else ""
                self._print(f"after step {step}: a machine will be preempted soon{shown}; writing a checkpoint")
            case WorkerSlow(step, rank, place, factor, cause):
                self._find(step, f"worker {rank} ({place}) is {factor:g} times as slow as the others: {cause}")
            case WorkerHangs():
                self._hangs.add(event)
            case WorkersAlive():
                pass
            case TrainingEnded():
                self._call("on_end", asdict(event))
            case TrainingStopped(step, reason):
                self._print(f"stopped after step {step}: {reason}")
            case _:
                assert_never(event)

    def reopen(self) -> None:
        """Tell callbacks of a training that ended, before more of its predictions come."""
        records = self._records()
        step = max((record["current_steps"] for record in records), default=0)
        self._call("on_setup", {"step": step, "log": records})

    def results(self, examples: int) -> dict[str, float]:
        """Mean loss and speed over all steps of the run, including those before an interruption.

        ``train_runtime`` is the time of the steps, without evaluations and checkpoints. ``effective_tokens_per_sec`` is the speed
        of one device.

        Args:
            examples: number of examples that these steps trained on.
        """
        steps = [record for record in self._records() if "step_seconds" in record]
        losses = [record["loss"] for record in steps if record["loss"] is not None]
        seconds = sum(record["step_seconds"] for record in steps)
        by_device = sum(record.get("throughput_per_device", 0.0) * record["step_seconds"] for record in steps)
        if not steps or not losses or not seconds:
            return {}
        return {
            "train_loss": sum(losses) / len(losses),
            "train_runtime": round(seconds, 3),
            "train_steps_per_second": round(len(steps) / seconds, 4),
            "train_samples_per_second": round(examples / seconds, 3),
            "train_tokens_per_second": round(steps[-1]["total_tokens"] / seconds, 2),
            "effective_tokens_per_sec": round(by_device / seconds, 2),
        }

    def _call(self, method: str, argument: Any) -> None:
        for callback in self._callbacks:
            if function := getattr(callback, method, None):
                function(argument)

    def _print(self, line: str) -> None:
        self._terminal.line(line)

    def _find(self, step: int, finding: str) -> None:
        """Print something that slows the training down, and keep it for the report."""
        self._print(f"step {step}: {finding}")
        append_json(self._log.with_name("diagnosis.jsonl"), {"step": step, "finding": finding})

    def _checkpoint_failed(self, event: CheckpointFailed) -> None:
        # When the storage fails for one worker, it fails for all of them: print it once.
        if (event.step, event.skipped) != self._last_failed:
            self._last_failed = event.step, event.skipped
            failed = (
                f"no checkpoint after step {event.step}: {event.reason}; training continues, older checkpoints are kept"
            )
            self._print(f"{event.worker}: {failed}" if event.worker else failed)

    def _wait(self, message: str) -> None:
        if time.time() - self._last_waiting > WAITING_SECONDS:
            self._last_waiting = time.time()
            self._print(message)

    def _set_up(self, setup: SetupDone) -> None:
        self._rewind(setup.step, setup.log)
        self._setup, self._setup_time = setup, time.time()
        if setup.step:
            self._print(
                f"resuming after step {setup.step} with {setup.workers} worker{'' if setup.workers == 1 else 's'}"
            )
        total, trained = setup.parameters, setup.trained_parameters
        self._print(f"model: {total / 1e6:,.1f}M parameters, {trained / 1e6:,.2f}M trainable ({trained / total:.2%})")

    def _step(self, record: StepRecord) -> None:
        if not self.timings and self._setup:
            now, process_start = time.time(), psutil.Process().create_time()
            self.timings = {
                "seconds_to_first_step": round(now - process_start, 2),
                "seconds_to_launch": round(self._launched - process_start, 2),
                "seconds_to_load_model": round(self._setup.model_seconds, 2),
                "seconds_to_wait_for_data": round(self._setup.data_wait_seconds, 2),
                "seconds_to_evaluate": round(now - self._setup_time - record.step_seconds, 2),
                "seconds_of_first_step": record.step_seconds,
            }
        self._print(record.line())
        self._terminal.advance("training", record.current_steps, record.total_steps)
        self._append(asdict(record))

    def _generated(self, record: Mapping[str, Any]) -> None:
        """Log the scores of predictions, in place of others for the same step: those were made with other settings.

        The same scores come again if the run ended before it removed their model.
        """
        at, records = record["current_steps"], self._records()
        known = [each for each in records if each["current_steps"] == at and _kind(each) == "generation"]
        if any(_scores(each) == _scores(json.loads(_json_line(record))) for each in known):
            return
        if known:
            others = [each for each in records if each not in known]
            write_atomically(self._log, "".join(map(_json_line, others)))
        self._print(progress_line(record))
        self._append(record)
        self._call("on_generate", record)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(_json_line(record))

    def _records(self) -> list[dict[str, Any]]:
        """Read the log, without an incomplete last line that a killed run may have left."""
        if not self._log.exists():
            return []
        lines = self._log.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def _rewind(self, step: int, checkpoint_log: Sequence[Mapping[str, Any]]) -> None:
        """Make the log end at the step that training resumes from.

        Later records are dropped, since their steps are repeated. Records that no driver lived to write come from the
        checkpoint.
        """
        records = [record for record in self._records() if record["current_steps"] <= step] if step else []
        written = {(record["current_steps"], _kind(record)) for record in records}
        records += [record for record in checkpoint_log if (record["current_steps"], _kind(record)) not in written]
        records.sort(key=lambda record: record["current_steps"])  # stable: an evaluation stays behind its step
        write_atomically(self._log, "".join(map(_json_line, records)))
