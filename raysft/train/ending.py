"""How one worker's training ends: with the trained model, or early, with a checkpoint to continue from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from raysft.telemetry.events import TrainingEnded, TrainingStopped
from raysft.train.assessment import Assessment
from raysft.train.averaging import averages
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.triggers import CheckpointTrigger
from raysft.train.decisions import from_first
from raysft.train.early_stopping import EarlyStopper
from raysft.train.export import Exporter
from raysft.train.saving import Checkpoints
from raysft.train.step_metrics import training_results
from raysft.train.training import Training
from raysft.train.watched_write import Watch, watched


class Ending:
    """Ends a training run. All workers call its methods together."""

    def __init__(
        self,
        training: Training,
        assessment: Assessment,
        stopper: EarlyStopper,
        checkpoints: Checkpoints,
        trigger: CheckpointTrigger,
        exporter: Exporter,
    ) -> None:
        """
        Args:
            training: the one that ends.
            assessment: of the last model.
            stopper: knows the best model.
            checkpoints: saves the last one.
            trigger: knows what this worker is asked to do, and which checkpoints stay.
            exporter: writes the trained model.
        """
        self._training, self._assessment, self._stopper = training, assessment, stopper
        self._checkpoints, self._trigger, self._exporter = checkpoints, trigger, exporter

    def finish(self, cursor: Cursor) -> None:
        """Evaluate, save the last checkpoint, write the model, and report the results, unless asked to stop meanwhile."""
        training, steps = self._training, self._training.row_plan.steps
        results: dict[str, Any] = training_results(training.row_plan, cursor, training.model)
        early = cursor.step < steps
        if early:
            results["planned_steps"] = steps
        self._assessment.at_the_end(cursor, early)
        if training.end.reason:
            return
        if any(from_first(self._trigger.stops(), device=training.device)):
            training.stop_as_asked()
            return
        if training.job.config.train.saves_on_schedule and cursor.step > training.first_step:
            self._checkpoints.save(cursor)  # a longer training run that resumes here must know the last evaluation
        elif averages(training.engine):
            self._save(cursor)  # while the model is written, the weights are not the ones being trained
        evaluation = self._write_model(cursor, results)
        training.emit(TrainingEnded(results, evaluation))

    def _write_model(self, cursor: Cursor, results: dict[str, Any]) -> dict[str, float]:
        """Write the trained model, and add to the results which model is the best; returns the evaluation of what was written."""
        training, best = self._training, self._stopper.best
        watch: Watch = partial(
            watched, asked=self._trigger.stops, react=partial(self._save, cursor), device=training.device
        )
        if best is not None and best.value is not None:
            results |= {"best_step": best.step, f"best_{best.metric}": best.value}
            if training.job.config.train.keep_best:
                self._exporter.promote_best(best.step, watch)
                return {name: value for name, value in best.results.items() if name.startswith("eval_")}
        with training.to_export() as (model, tokenizer):
            self._exporter.write(model, tokenizer, watch)
        return self._assessment.eval_results

    def _save(self, cursor: Cursor) -> None:
        """Save the final state of the training while its model is written."""
        if self._checkpoints.is_unsaved(cursor):
            self._checkpoints.save(replace(cursor, temporary=True))
            self._training.phases.enter("export")

    def stop(self, cursor: Cursor) -> None:
        """End early, with a checkpoint to continue from."""
        if self._checkpoints.is_unsaved(cursor):
            unevaluated = self._assessment.is_lacking(cursor)
            kept = self._trigger.is_scheduled(cursor.step) and not unevaluated
            self._checkpoints.save(replace(cursor, temporary=not kept, unevaluated=unevaluated))
        end = self._training.end
        self._training.emit(TrainingStopped(cursor.step, end.reason, self._assessment.eval_results, end.failed))
