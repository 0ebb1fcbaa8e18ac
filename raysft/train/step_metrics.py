"""The records logged for steps and evaluations, from what was planned and what was measured."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from raysft.models.kt_experts import elements_of_experts
from raysft.telemetry.events import SetupDone, StepRecord
from raysft.telemetry.terminal import duration
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.flops import count, model_flops, peak_flops, trainer_flops, weights_of
from raysft.train.phases import Phases
from raysft.train.step import StepResult


class StepMetrics:
    """Makes the record of each step."""

    def __init__(self, row_plan: Any, sources: tuple[str, ...], workers: int, device: torch.device, model: Any) -> None:
        """
        Args:
            row_plan: of the training rows.
            sources: names of the sources, by source number.
            workers: number of devices that train.
            device: of this worker.
            model: the transformers or peft model inside the engine.
        """
        self._row_plan, self._sources, self._workers = row_plan, sources, workers
        self._device, self._model, self._peak = device, model, peak_flops(device)

    def record(
        self,
        cursor: Cursor,
        result: StepResult,
        lr: float,
        seconds: float,
        data_wait: float,
        elapsed: float,
        remaining: float,
    ) -> StepRecord:
        """Make the record of a step.

        Args:
            cursor: after the step.
            result: of the step.
            lr: learning rate of the step.
            seconds: duration of the step.
            data_wait: seconds before that until all workers had their rows.
            elapsed: seconds since the training started or resumed.
            remaining: estimated seconds to the end of the training.
        """
        row_plan, step = self._row_plan, cursor.step - 1
        tokens, loss_tokens = int(row_plan.step_tokens[step]), int(row_plan.step_loss_tokens[step])
        memory, memory_total = _memory(self._device)
        return StepRecord(
            current_steps=cursor.step,
            total_steps=row_plan.steps,
            loss=result.loss,
            lr=lr,
            grad_norm=result.norm,
            epoch=round(row_plan.epoch_of(cursor.rows), 4),
            percentage=round(100 * cursor.step / row_plan.steps, 2),
            elapsed_time=duration(elapsed),
            remaining_time=duration(remaining),
            throughput=round(tokens / seconds, 2),
            total_tokens=cursor.tokens,
            loss_tokens=loss_tokens,
            packing_efficiency=round(tokens / (int(row_plan.step_rows[step]) * row_plan.capacity), 6),
            rows=cursor.rows,
            step_seconds=round(seconds, 4),
            data_wait_seconds=round(data_wait, 4),
            memory_gib=round(memory, 3),
            memory_total_gib=round(memory_total, 3),
            loss_token_throughput=round(loss_tokens / seconds, 2),
            throughput_per_device=round(tokens / seconds / self._workers, 2),
            loss_token_throughput_per_device=round(loss_tokens / seconds / self._workers, 2),
            mfu=self._mfu(step, seconds),
            source_losses=self._source_losses(step, result),
            router_aux_loss=result.router_aux_loss,
        )

    def _source_losses(self, step: int, result: StepResult) -> dict[str, float]:
        if len(self._sources) == 1:
            return {}
        weights = self._row_plan.source_weight(step, len(self._sources))
        sums = zip(self._sources, result.by_source, weights, strict=True)
        return {name: float(loss / weight) for name, loss, weight in sums if weight}

    def _mfu(self, step: int, seconds: float) -> float | None:
        if self._peak is None:
            return None
        row_plan = self._row_plan
        tokens, loss_tokens = float(row_plan.step_tokens[step]), float(row_plan.step_loss_tokens[step])
        flops = model_flops(self._model, tokens, float(row_plan.step_squares[step]), loss_tokens)
        return round(flops / seconds / self._peak / self._workers, 4)


def worker_values(phases: Phases, device: torch.device) -> dict[str, float | None]:
    """Return what a worker currently reports about itself: the values of ``raysft.telemetry.ray_metrics.WORKER_GAUGES``."""
    times = phases.last_step
    return {
        "raysft_worker_step_seconds": times and times.step,
        "raysft_worker_data_wait_seconds": times and times.data_wait,
        "raysft_worker_forward_seconds": times and times.forward,
        "raysft_worker_idle_seconds": phases.idle(),
        "raysft_worker_memory_gibibytes": _memory(device)[0],
    }


def training_results(row_plan: Any, cursor: Cursor, model: Any) -> dict[str, float]:
    """Say how much was trained since the first step of the run."""
    return {
        "total_flos": trainer_flops(model, cursor.tokens),
        "num_input_tokens_seen": cursor.tokens,
        "total_steps": cursor.step,
        "total_rows": cursor.rows,
        "total_tokens": cursor.tokens,
        "epoch": round(row_plan.epoch_of(cursor.rows), 4),
    }


def setup_done(
    model: torch.nn.Module,
    step: int,
    workers: int,
    model_seconds: float,
    data_seconds: float,
    log: list[dict[str, Any]],
) -> SetupDone:
    """Make the event of a loaded model.

    Args:
        model: the transformers or peft model inside the engine.
        step: a field of the event, as are all that follow.
    """
    parameters = [weight for _, weight in weights_of(model)]
    trained = sum(count(p) for p in parameters if p.requires_grad)
    total = sum(map(count, parameters)) + elements_of_experts(model)[0]
    return SetupDone(step, workers, model_seconds, data_seconds, total, trained, log)


def evaluation_record(row_plan: Any, cursor: Cursor, results: dict[str, float]) -> dict[str, Any]:
    """Make the record of an evaluation: where the training stands, and the results."""
    return {
        "current_steps": cursor.step,
        "total_steps": row_plan.steps,
        "epoch": round(row_plan.epoch_of(cursor.rows), 4),
        "percentage": round(100 * cursor.step / row_plan.steps, 2),
        **results,
    }


def _memory(device: torch.device) -> tuple[float, float]:
    """(peak, total) GiB of the GPU; without a GPU, (resident memory of this process, memory of the node)."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 2**30, total / 2**30
    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30
