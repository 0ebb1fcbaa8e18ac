"""The evaluations of a training: all sets after a step, logged and reported."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from typing import Any

import torch
import torch.distributed as dist

from raysft.telemetry.events import Emit, EvaluationDone, evaluation_results
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.first_evaluation import FirstEvaluation
from raysft.train.job import RowPlan, TrainJob
from raysft.train.step import evaluate
from raysft.train.step_metrics import evaluation_record


class Evaluator:
    """Evaluates the model of one worker; all workers do it together."""

    def __init__(
        self,
        job: TrainJob,
        device: torch.device,
        emit: Emit,
        log: MutableSequence[dict[str, Any]],
        stops: Callable[[], bool],
    ) -> None:
        """
        Args:
            job: what is trained.
            device: where to compute.
            emit: receives ``EvaluationDone``.
            log: receives its record.
            stops: True if this worker was asked to stop.
        """
        self._job, self._device, self._emit, self._log, self._stops = job, device, emit, log, stops
        self._row_plan: RowPlan = job.train_rows.row_plan
        self.seen: int | None = None
        """The step after which it was evaluated last."""

    def __call__(self, engine: Any, cursor: Cursor, first: FirstEvaluation | None = None) -> dict[str, float]:
        """Evaluate all sets but those known from ``first``, log and return the results.

        Raises:
            EvaluationStopped: a worker was asked to stop; raised by all workers alike, and nothing is logged.
        """
        rows, known = self._job.config.micro_batch_size, first.known if first else {}
        rank, workers = dist.get_rank(), dist.get_world_size()
        evaluations = [
            known.get(name)
            or evaluate(engine, name, cursor.step, source.steps(0, rank, workers), rows, self._device, self._stops)
            for name, source in self._job.eval_rows.items()
        ]
        self.seen = cursor.step
        results = evaluation_results(evaluations)
        if results:
            record = evaluation_record(self._row_plan, cursor, results)
            self._log.append(record)
            self._emit(EvaluationDone(record, first.keep(evaluations) if first else ""))
        return results
