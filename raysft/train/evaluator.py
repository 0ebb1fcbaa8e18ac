"""The evaluations of a training run: all sets after a step, logged and reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableSequence
from typing import Any

import torch

from raysft.telemetry.events import Emit, EvaluationDone
from raysft.telemetry.results import evaluation_results
from raysft.train.checkpoint.cursor import EVALUATION, Cursor
from raysft.train.evaluation import evaluate
from raysft.train.first_evaluation import FirstEvaluation
from raysft.train.job import Batch, RowPlan, TrainJob
from raysft.train.phases import Phases
from raysft.train.pixels import ImageInputs
from raysft.train.sequence_group import ALONE, SequenceGroup
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
        phases: Phases,
        images: ImageInputs | None = None,
        group: SequenceGroup = ALONE,
    ) -> None:
        """
        Args:
            job: what is trained.
            device: where to compute.
            emit: receives ``EvaluationDone``.
            log: receives its record.
            stops: True if this worker was asked to stop.
            phases: told what this worker does.
            images: makes the pixels of images.
            group: the workers that have the same rows.
        """
        self._group = group
        self._images = images
        self._job, self._device, self._emit, self._log, self._stops = job, device, emit, log, stops
        self._phases = phases
        self._row_plan: RowPlan = job.train_rows.row_plan
        self.seen: int | None = None
        """The step after which it last evaluated."""

    def __call__(self, engine: Any, cursor: Cursor, first: FirstEvaluation | None = None) -> dict[str, float]:
        """Evaluate all sets except those known from ``first``, log and return the results.

        Raises:
            EvaluationStopped: a worker was asked to stop; raised by all workers alike, and nothing is logged.
        """
        self._phases.enter("evaluation", cursor.step)
        rows, known = self._job.config.micro_batch_size, first.known if first else {}
        evaluations = [
            known.get(name)
            or evaluate(
                engine,
                name,
                cursor.step,
                self._batches(source),
                rows,
                self._device,
                self._stops,
                source.row_plan.examples,
                self._images,
                source,
                self._group,
            )
            for name, source in self._job.eval_rows.items()
        ]
        self.seen = cursor.step
        results = evaluation_results(evaluations)
        if results:
            record = evaluation_record(self._row_plan, cursor, results)
            self._log.append(record)
            self._emit(EvaluationDone(record, first.keep(evaluations) if first else ""))
        return results

    def known(self, cursor: Cursor) -> dict[str, float]:
        """Return the results that the checkpoint's log has of an evaluation after the cursor's step; empty if it has none.

        A training run that ended before its model was written need not evaluate it again.
        """
        if cursor.identity.get(EVALUATION) != self._job.identity.get(EVALUATION):
            return {}  # different sets are evaluated now
        record = next((each for each in reversed(self._log) if "eval_loss" in each), {})
        if record.get("current_steps") != cursor.step:
            return {}
        self.seen = cursor.step
        return {name: value for name, value in record.items() if name.startswith("eval_")}

    def _batches(self, source: Any) -> Iterator[Batch]:
        """Yield this worker's rows of a set; each batch shows that the evaluation continues."""
        for batch in source.steps(0, self._group.number, self._group.groups):
            self._phases.progress()
            yield batch
