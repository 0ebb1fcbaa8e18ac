"""The figures of a step."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from raysft.telemetry.events import StepRecord
from raysft.telemetry.terminal import duration
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.flops import model_flops, peak_flops
from raysft.train.step import StepResult


class StepMetrics:
    """Makes the record of each step from what is planned and what was measured."""

    def __init__(self, row_plan: Any, sources: tuple[str, ...], workers: int, device: torch.device, model: Any) -> None:
        """
        Args:
            row_plan: of the training rows.
            sources: names, in the order of their numbers.
            workers: how many devices share the work.
            device: this worker's.
            model: the transformers model inside.
        """
        self._row_plan, self._sources, self._workers = row_plan, sources, workers
        self._device, self._model, self._peak = device, model, peak_flops(device)

    def record(
        self,
        cursor: Cursor,
        trained: StepResult,
        lr: float,
        seconds: float,
        data_wait: float,
        elapsed: float,
        left: float,
    ) -> StepRecord:
        """The record of a step.

        Args:
            cursor: after the step.
            trained: what it came to.
            lr: its learning rate.
            seconds: that it took.
            data_wait: seconds that it waited for rows before.
            elapsed: seconds since the training began, or went on.
            left: seconds to its end, as far as is known.
        """
        row_plan, step = self._row_plan, cursor.step - 1
        tokens, targets = int(row_plan.step_tokens[step]), int(row_plan.step_loss_tokens[step])
        memory, memory_total = _memory(self._device)
        return StepRecord(
            current_steps=cursor.step,
            total_steps=row_plan.steps,
            loss=trained.loss,
            lr=lr,
            grad_norm=trained.norm,
            epoch=round(row_plan.epoch_of(cursor.rows), 4),
            percentage=round(100 * cursor.step / row_plan.steps, 2),
            elapsed_time=duration(elapsed),
            remaining_time=duration(left),
            throughput=round(tokens / seconds, 2),
            total_tokens=cursor.tokens,
            loss_tokens=targets,
            packing_efficiency=round(tokens / (int(row_plan.step_rows[step]) * row_plan.capacity), 6),
            rows=cursor.rows,
            step_seconds=round(seconds, 4),
            data_wait_seconds=round(data_wait, 4),
            memory_gib=round(memory, 3),
            memory_total_gib=round(memory_total, 3),
            loss_token_throughput=round(targets / seconds, 2),
            throughput_per_device=round(tokens / seconds / self._workers, 2),
            loss_token_throughput_per_device=round(targets / seconds / self._workers, 2),
            mfu=self._mfu(step, seconds),
            source_losses=self._source_losses(step, trained),
        )

    def _source_losses(self, step: int, trained: StepResult) -> dict[str, float]:
        if len(self._sources) == 1:
            return {}
        weights = self._row_plan.source_weight(step, len(self._sources))
        pairs = zip(self._sources, trained.by_source, weights, strict=True)
        return {name: float(total / weight) for name, total, weight in pairs if weight}

    def _mfu(self, step: int, seconds: float) -> float | None:
        if self._peak is None:
            return None
        row_plan = self._row_plan
        tokens, targets = float(row_plan.step_tokens[step]), float(row_plan.step_loss_tokens[step])
        flops = model_flops(self._model, tokens, float(row_plan.step_squares[step]), targets)
        return round(flops / seconds / self._peak / self._workers, 4)


def _memory(device: torch.device) -> tuple[float, float]:
    """(peak used, there) GiB of the device; without GPU, what this process holds and what the node has."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_allocated(device) / 2**30, there / 2**30
    return psutil.Process().memory_info().rss / 2**30, psutil.virtual_memory().total / 2**30
