"""The training log: what workers report, written to a file and printed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from raysft.telemetry.terminal import Terminal

QUIET_SECONDS = 5.0
"""How often it is said that a storage is waited for."""


def evaluation_line(results: Mapping[str, Any]) -> str:
    """Evaluation results as one line."""
    return (
        f"eval loss {results['eval_loss']:.4f} | perplexity {results['eval_perplexity']:.2f} | "
        f"token accuracy {100 * results['eval_accuracy']:.1f}% | {results['eval_tokens']:,} trained tokens"
    )


def _line(record: Mapping[str, Any]) -> str:
    # JSON has no infinity: readers of other languages would stumble over the whole file.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


class TrainLog:
    """Takes the workers' events in the driver: writes the log file, prints, calls callbacks, measures the start."""

    def __init__(self, log: Path, terminal: Terminal, callbacks: Sequence[Any] = ()) -> None:
        """
        Args:
            log: ``trainer_log.jsonl``; a resumed run goes on in it, from the checkpoint's step.
            terminal: where lines go.
            callbacks: objects with any of ``on_setup``, ``on_step``, ``on_evaluate``, ``on_checkpoint`` and ``on_end``.
        """
        self._log, self._terminal, self._callbacks = log, terminal, callbacks
        self._launched = time.time()
        self._setup: dict[str, Any] = {}
        self._set_up = 0.0
        self._unsaved, self._waiting = (-1, False), 0.0
        """What was said last: which checkpoint was not written or left out, and when a storage was waited for."""
        self.timings: dict[str, float] = {}
        """Where the seconds to the first step went; empty until it was done."""

    def __call__(self, event: str, content: Any) -> None:
        """Take one event."""
        if event == "setup":
            self._begin(content)
        elif event == "step":
            self._step(content)
        elif event == "evaluate":
            self._terminal.line(f"after step {content['current_steps']} | {evaluation_line(content)}")
            self._append(content)
        elif event == "skipped":
            self._terminal.line(f"step {content['step']} is left out: {content['reason']}")
        elif event == "stopped":
            self._terminal.line(
                f"stopped after step {content['step']}: no evaluation was better than that after step "
                f"{content['best_step']} (eval loss {content['best_loss']:.4f})"
            )
        elif event == "damaged":
            self._terminal.line(f"{content}; it is passed over for the one before")
        elif event == "failure":
            self._terminal.line(f"{content}; starting again")
        elif event == "resize":
            self._terminal.line(f"there is room for {content['after']} workers now instead of {content['before']}")
        elif event == "notice":
            self._terminal.line(
                f"after step {content['step']}: a machine is about to be taken away"
                + (f" ({content['reason']})" if content["reason"] else "")
            )
        elif event == "checkpoint":
            self._terminal.line(f"checkpoint after step {content['step']}")
        elif event in ("unsaved", "waiting"):
            self._trouble(event, content)
        for callback in self._callbacks:
            method = getattr(callback, f"on_{event}", None)
            if method is not None:
                method(content)

    def _trouble(self, event: str, content: Any) -> None:
        """Say that the storage fails; where it does for one worker, it does for a thousand."""
        if event == "unsaved" and (content["step"], content["left_out"]) != self._unsaved:
            self._unsaved = content["step"], content["left_out"]
            self._terminal.line(
                f"no checkpoint after step {content['step']}: {content['reason']}; the training goes on, and older ones stay"
            )
        elif event == "waiting" and time.time() - self._waiting > QUIET_SECONDS:
            self._waiting = time.time()
            self._terminal.line(content)

    def results(self) -> dict[str, float]:
        """Mean loss and speed over all steps of the run, those before it was interrupted too."""
        steps = [record for record in self._records() if "step_seconds" in record]
        losses = [record["loss"] for record in steps if record["loss"] is not None]
        seconds = sum(record["step_seconds"] for record in steps)
        if not steps or not losses or not seconds:
            return {}
        return {
            "train_loss": sum(losses) / len(losses),
            "train_runtime": round(seconds, 3),
            "train_steps_per_second": round(len(steps) / seconds, 4),
            "train_tokens_per_second": round(steps[-1]["total_tokens"] / seconds, 2),
        }

    def _begin(self, content: dict[str, Any]) -> None:
        self._go_back(content["step"], content.get("log", ()))
        self._setup, self._set_up = content, time.time()
        if content["step"]:
            workers = content["workers"]
            self._terminal.line(
                f"going on after step {content['step']} with {workers} worker{'' if workers == 1 else 's'}"
            )
        whole, trained = content["parameters"], content["trained_parameters"]
        self._terminal.line(
            f"model: {whole / 1e6:,.1f}M parameters, {trained / 1e6:,.2f}M of them trained ({trained / whole:.2%})"
        )

    def _step(self, record: Any) -> None:
        if not self.timings:
            now, born = time.time(), psutil.Process().create_time()
            self.timings = {
                "seconds_to_first_step": round(now - born, 2),
                "seconds_to_launch": round(self._launched - born, 2),
                "seconds_to_load_model": round(self._setup["model_seconds"], 2),
                "seconds_to_wait_for_data": round(self._setup["data_wait_seconds"], 2),
                "seconds_to_evaluate": round(now - self._set_up - record.step_seconds, 2),
                "seconds_of_first_step": record.step_seconds,
            }
        self._terminal.line(record.line())
        self._terminal.advance("training", record.current_steps, record.total_steps)
        self._append(asdict(record))

    def _append(self, content: Mapping[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(_line(content))

    def _records(self) -> list[dict[str, Any]]:
        """What the log holds; a half line, as a killed run may have left it, does not count."""
        if not self._log.exists():
            return []
        lines = self._log.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def _go_back(self, step: int, known: Sequence[Mapping[str, Any]]) -> None:
        """Let the log end where the training goes on from: what came after is done again, and what this process, or one
        before it, did not live to write comes from the checkpoint."""
        kept = [record for record in self._records() if record["current_steps"] <= step] if step else []
        there = {(record["current_steps"], "loss" in record) for record in kept}
        kept += [record for record in known if (record["current_steps"], "loss" in record) not in there]
        kept.sort(key=lambda record: record["current_steps"])  # an evaluation stays behind its step
        draft = self._log.with_name(f".{self._log.name}.{os.getpid()}")
        draft.write_text("".join(map(_line, kept)), encoding="utf-8")
        draft.replace(self._log)
