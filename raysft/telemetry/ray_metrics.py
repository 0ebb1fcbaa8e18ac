"""A training's metrics in Ray's own metrics, which each node exports for Prometheus.

Prometheus sees them with Ray's prefix, such as ``ray_raysft_loss{run="…"}``. ``raysft.telemetry.dashboard`` has the panels and
alerts that are made of them. Their names are an interface: other people's dashboards use them.

The driver tells what concerns the whole run, and each worker tells the Ray of its own node what concerns itself: nothing is
gathered, and a node exports the values of its own workers alone. So there are ``len(WORKER_GAUGES)`` series for each worker,
whatever happens in it, and 5,000 for a thousand workers. No tag has a value that grows with time, such as a step.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from raysft.telemetry.events import (
    CheckpointFailed,
    CheckpointSaved,
    EvaluationDone,
    Event,
    PreemptionNotice,
    SetupDone,
    StepRecord,
    StepSkipped,
    Waiting,
    WorkerHangs,
    WorkerSlow,
    WorkersRestarting,
)

REPEAT_SECONDS = 5.0
"""Time after which values are given again: Ray forgets those of a process that has told no new one for 20 seconds."""
GAUGES = {
    "raysft_loss": "Mean loss over the loss tokens of the last step.",
    "raysft_eval_loss": "Mean loss of the last evaluation.",
    "raysft_learning_rate": "Learning rate of the last step.",
    "raysft_gradient_norm": "Gradient norm of the last step, before clipping.",
    "raysft_tokens_per_second": "Tokens per second over all workers, without padding.",
    "raysft_model_flops_utilization": "The model's own FLOPs divided by the devices' peak, from 0 to 1.",
    "raysft_step_seconds": "Seconds of the last step.",
    "raysft_data_wait_seconds": "Seconds that the last step waited for its rows.",
    "raysft_memory_gibibytes": "Peak memory of the first worker's GPU; without a GPU, memory of its process.",
    "raysft_steps_done": "Steps that are done.",
    "raysft_steps_planned": "Steps of the whole training.",
    "raysft_workers": "Workers that train.",
    "raysft_step_time": "When the last step ended, in seconds since 1970.",
    "raysft_checkpoint_time": "When the last checkpoint was complete, or else the training began, in seconds since 1970.",
}
"""Name → description."""
COUNTERS = {
    "raysft_worker_restarts_total": "Times that the workers were started again.",
    "raysft_preemption_notices_total": "Machines that were about to be taken away.",
    "raysft_steps_skipped_total": "Steps whose loss or gradient was not finite.",
    "raysft_checkpoint_failures_total": "Checkpoints that could not be written.",
    "raysft_waits_total": "Times that a wait for storage or nodes was reported.",
    "raysft_slow_workers_total": "Workers that were found slower than the others.",
    "raysft_hangs_total": "Reports of workers without progress.",
}
"""The same for what is counted. They are gauges as well: Ray's counters do not exist before the first event, and Prometheus finds
no increase in what has just begun to exist."""
WORKER_GAUGES = {
    "raysft_worker_step_seconds": "Seconds of the last step; all workers wait for each other in it.",
    "raysft_worker_data_wait_seconds": "Seconds that this worker waited for its rows before the last step.",
    "raysft_worker_forward_seconds": "Seconds of this worker's forward passes in the last step.",
    "raysft_worker_idle_seconds": "Seconds since this worker has last made progress, in whatever phase.",
    "raysft_worker_memory_gibibytes": "Peak memory of this worker's GPU; without a GPU, memory of its process.",
}
"""The same for what each worker tells of itself, with the tags ``run``, ``rank`` and ``node``."""
COUNTED: dict[type, str] = {
    WorkersRestarting: "raysft_worker_restarts_total",
    PreemptionNotice: "raysft_preemption_notices_total",
    StepSkipped: "raysft_steps_skipped_total",
    CheckpointFailed: "raysft_checkpoint_failures_total",
    Waiting: "raysft_waits_total",
    WorkerSlow: "raysft_slow_workers_total",
    WorkerHangs: "raysft_hangs_total",
}
"""Events, and the counter of each."""


class _Repeated:
    """Gauges whose values are given to Ray again and again, inside a ``with`` block, at whose end the values go."""

    def __init__(self, gauges: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """
        Args:
            gauges: name → description.
            tags: of all of them.
        """
        from ray.util.metrics import Gauge

        self._gauges = {name: Gauge(name, text, tag_keys=tuple(tags)) for name, text in gauges.items()}
        for gauge in self._gauges.values():
            gauge.set_default_tags(dict(tags))
        self._values: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._closing.wait(REPEAT_SECONDS):
            self._refresh()
            for name, value in list(self._values.items()):
                self._gauges[name].set(value)

    def _refresh(self) -> None:
        """Take new values before they are given again."""

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._values[name] = float(value)
                self._gauges[name].set(float(value))


class WorkerMetrics(_Repeated):
    """One worker's own times, which it gives to the Ray of its node; a thread looks at them, and no step waits for that."""

    def __init__(self, run: str, rank: int, node: str, look: Callable[[], Mapping[str, float | None]]) -> None:
        """
        Args:
            run: name of the run.
            rank: of the worker.
            node: name of its host.
            look: returns the values of ``WORKER_GAUGES`` at this moment; None where there is none yet.
        """
        super().__init__(WORKER_GAUGES, {"run": run, "rank": str(rank), "node": node})
        self._look = look

    def _refresh(self) -> None:
        with suppress(Exception):  # a device that fails ends the training itself, with a better message
            self._set(self._look())


class RayMetrics(_Repeated):
    """A run's metrics: handles events in the driver."""

    def __init__(self, run: str) -> None:
        """``run`` is the tag of all metrics."""
        super().__init__(GAUGES | COUNTERS, {"run": run})
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._set(self._counts)

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case SetupDone(step, workers):
                self._set({"raysft_workers": workers, "raysft_steps_done": step, "raysft_checkpoint_time": time.time()})
            case StepRecord():
                self._set(_step_values(event))
            case EvaluationDone(record):
                self._set({"raysft_eval_loss": record.get("eval_loss")})
            case CheckpointSaved():
                self._set({"raysft_checkpoint_time": time.time()})
            case _ if counter := COUNTED.get(type(event)):
                self._counts[counter] += 1
                self._set({counter: self._counts[counter]})


def _step_values(record: StepRecord) -> dict[str, float | None]:
    return {
        "raysft_loss": record.loss,
        "raysft_learning_rate": record.lr,
        "raysft_gradient_norm": record.grad_norm,
        "raysft_tokens_per_second": record.throughput,
        "raysft_model_flops_utilization": record.mfu,
        "raysft_step_seconds": record.step_seconds,
        "raysft_data_wait_seconds": record.data_wait_seconds,
        "raysft_memory_gibibytes": record.memory_gib,
        "raysft_steps_done": record.current_steps,
        "raysft_steps_planned": record.total_steps,
        "raysft_step_time": time.time(),
    }
