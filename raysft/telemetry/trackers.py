"""Experiment trackers: callbacks of the training log that send metrics to TensorBoard, W&B, MLflow, SwanLab or trackio."""

from __future__ import annotations

import importlib.util
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from raysft.errors import one_line
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.tracker_labels import Labels
from raysft.telemetry.tracker_writers import WRITERS, MLflowSweep, Outcome, Writer

OPEN_SECONDS, CLOSE_SECONDS = 60.0, 60.0
"""How long a tracker may take to open, and to write its queue at the end."""
MAX_QUEUED = 10_000
"""Most writes that wait for a tracker's server."""
VARIABLES = ("WANDB_", "MLFLOW_", "DATABRICKS_", "SWANLAB_", "TRACKIO_")
"""How the environment variables of trackers begin."""
STEP_METRICS = (
    "loss",
    "lr",
    "grad_norm",
    "throughput",
    "loss_token_throughput",
    "mfu",
    "router_aux_loss",
    "packing_efficiency",
    "memory_gib",
    "data_wait_seconds",
)
"""Fields of a ``StepRecord`` that trackers show."""
FACTS = {"eval": ("tokens",), "predict": ("_low", "_high", "examples")}
"""Section of metrics → how the names of those end that trackers do not show."""


def missing_tracker(names: Sequence[str]) -> str | None:
    """Return the first tracker that is not installed; each package is named like its tracker."""
    return next((name for name in names if importlib.util.find_spec(name) is None), None)


def tracker_variables() -> dict[str, str]:
    """Return the environment variables in which trackers find servers and keys."""
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


def open_trackers(
    names: Sequence[str],
    run: RunDirectory,
    config: Mapping[str, Any],
    notify: Callable[[str], None] = print,
    labels: Labels | None = None,
) -> list[Tracker]:
    """Open one callback per tracker.

    Args:
        names: keys of ``WRITERS``.
        run: the run directory.
        config: the resolved config, shown with the metrics.
        notify: receives a line when a tracker fails during training.
        labels: names under which the run is shown. Default: that of its directory.

    Raises:
        RuntimeError: a tracker cannot be opened, for example because there is no key or its server does not respond.
    """
    shown = labels or Labels(run.place.name)
    return [Tracker(name, lambda writer=WRITERS[name]: writer(run, config, shown), notify) for name in names]


def open_sweep(
    names: Sequence[str], config: Mapping[str, Any], notify: Callable[[str], None], labels: Labels
) -> list[Tracker]:
    """Open what a tracker shows for a sweep itself, before its first trial; arguments and errors are those of ``open_trackers``.

    Only MLflow needs this: trials that start at the same time would each make a parent run.
    """
    return [Tracker(name, lambda: MLflowSweep(config, labels), notify) for name in names if name == "mlflow"]


class Tracker:
    """Turns callbacks into metrics and writes them in a separate thread.

    Training never waits for a tracker's server. When a tracker fails, it is disabled and training continues.
    """

    def __init__(self, name: str, make: Callable[[], Writer], notify: Callable[[str], None]) -> None:
        self.name, self.notify, self.broken = name, notify, False
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_QUEUED)
        self._opened: queue.Queue[Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, args=(make,), name=name, daemon=True)
        self._thread.start()
        try:
            error = self._opened.get(timeout=OPEN_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"cannot open {name} (no answer for {OPEN_SECONDS:g} s)") from None
        if error:  # every library has its own error types
            raise RuntimeError(f"cannot open {name} ({one_line(error)})") from error

    def _work(self, make: Callable[[], Writer]) -> None:
        try:
            self._writer = make()
        except Exception as error:
            self._opened.put(error)
            return
        self._opened.put(None)
        while task := self._tasks.get():
            try:
                if not self.broken:
                    task()
            except Exception as error:
                self._disable(one_line(error))

    def _disable(self, reason: str) -> None:
        if not self.broken:
            self.broken = True
            self.notify(f"{self.name}: disabled ({reason}); trainer_log.jsonl has all metrics")

    def _enqueue(self, task: Callable[[], None]) -> None:
        if self.broken:
            return
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._disable(f"{MAX_QUEUED} writes are waiting")

    def on_setup(self, setup: Mapping[str, Any]) -> None:
        """Start the tracker's run, or resume it with what it lacks of the log."""
        log = [(record["current_steps"], log_metrics(record)) for record in setup["log"]]
        self._enqueue(lambda: self._writer.begin(setup["step"], log))

    def on_step(self, record: Any) -> None:
        """Write the metrics of an optimizer step as ``train/NAME``."""
        self._write(asdict(record))

    def on_evaluate(self, results: Mapping[str, Any]) -> None:
        """Write the results of an evaluation as ``eval/NAME``."""
        self._write(results)

    def on_generate(self, results: Mapping[str, Any]) -> None:
        """Write the scores of a step's predictions as ``predict/NAME``."""
        self._write(results)

    def _write(self, record: Mapping[str, Any]) -> None:
        step, metrics = record["current_steps"], log_metrics(record)
        self._enqueue(lambda: self._writer.write(step, metrics))

    def close(self, outcome: Outcome = "finished") -> None:
        """Show how the run ended, and wait at most ``CLOSE_SECONDS`` until everything is written."""
        self._enqueue(lambda: self._writer.close(outcome))
        with suppress(queue.Full):
            self._tasks.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._disable(f"no answer for {CLOSE_SECONDS:g} s")


def log_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers show of a record of the log: its finite metrics as ``train/NAME``, ``eval/NAME`` or ``predict/NAME``.

    >>> log_metrics({"current_steps": 2, "eval_loss": 1.5, "eval_tokens": 9, "predict_examples": 8, "predict_chrf": 31.0})
    {'eval/loss': 1.5, 'predict/chrf': 31.0}
    """
    metrics = {f"train/{name}": record[name] for name in STEP_METRICS if name in record}
    for source, loss in (record.get("source_losses") or {}).items():
        # Not train/loss/SOURCE: MLflow cannot store a metric and a folder of the same name.
        metrics[f"train/source_loss/{source}"] = loss
    for section, facts in FACTS.items():
        for key, value in record.items():
            if key.startswith(f"{section}_") and not key.endswith(facts):
                metrics[f"{section}/{key.removeprefix(f'{section}_')}"] = value
    return {name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)}
