"""Assess the model after a step: evaluate it, have it predict, and see whether it is the best so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from raysft.errors import RunFailed
from raysft.telemetry.events import StoppedEarly
from raysft.train.averaging import averaged
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.early_stopping import EarlyStopper, MetricMissing, known_best
from raysft.train.evaluation import EvaluationStopped
from raysft.train.evaluator import Evaluator
from raysft.train.export import Exporter
from raysft.train.first_evaluation import FirstEvaluation
from raysft.train.generation import StepGenerations
from raysft.train.intervals import Interval
from raysft.train.training import Training


def early_stopper(training: Training, exporter: Exporter, cursor: Cursor) -> EarlyStopper:
    """Return what compares models, starting with the best one recorded in a checkpoint.

    Args:
        training: whose models are compared.
        exporter: keeps the best one.
        cursor: of the checkpoint.
    """
    train = training.job.config.train
    best = known_best(train, cursor, training.job.identity)
    if train.keep_best:
        best = exporter.confirm_best(best)

    def keep() -> None:
        assert stopper.best
        with training.to_export() as (model, tokenizer):
            exporter.save_best(stopper.best.step, model, tokenizer)

    stopper = EarlyStopper(train, keep, best)
    return stopper


class Assessment:
    """Assesses the models of one worker's training; all workers do it together.

    Each method may find that the training should end; ``training.end`` says so.
    """

    def __init__(
        self,
        training: Training,
        evaluator: Evaluator,
        generations: StepGenerations,
        stopper: EarlyStopper,
        results: dict[str, float],
    ) -> None:
        """
        Args:
            training: whose models are assessed.
            evaluator: computes their losses.
            generations: has them predict.
            stopper: compares them.
            results: of the evaluation at the step where the training resumes; empty if there are none.
        """
        self._training, self._evaluator, self._generations, self._stopper = training, evaluator, generations, stopper
        self._evaluations = Interval.of_evaluations(training.job.config.train, training.row_plan)
        self.eval_results = results
        """Results of the latest evaluation."""

    def before_first_step(self, cursor: Cursor) -> None:
        """Assess the untrained model."""
        self._generations.resume(cursor)
        if self._training.job.config.train.eval_at_start:
            self._evaluate(cursor, FirstEvaluation.find(self._training.job, self._training.device))

    def resume(self, cursor: Cursor) -> bool:
        """Take up the predictions of an earlier process; returns True if those after the cursor's step are due but not begun."""
        results = self._generations.resume(cursor, bool(self._needed_score))
        missing = self._generations.is_missing(cursor, self._needed_score)
        if self._needed_score and not (self._training.end.reason or missing) and self._generations.is_due(cursor.step):
            # A remote run stores these scores only after the workers hear of them.
            self._compare_scores(cursor, results or self._generations.results(cursor.step))
        return missing

    def evaluate_if_due(self, cursor: Cursor) -> bool:
        """Evaluate and compare the model if that is due after this step; returns True if it did."""
        if not self._evaluations.is_due(cursor.step):
            return False
        self._evaluate(cursor)
        if not self._training.end.reason:
            self._compare(cursor, self.eval_results)
        if not self._training.end.reason:
            self._tell_early_stop(cursor)
        return not self._training.end.reason

    def generate(self, cursor: Cursor) -> None:
        """Have the model of this step predict, if that is due; wait for predictions only if the training has to."""
        if not self._generations.is_due(cursor.step):
            return self._generations.after_step(cursor)
        training = self._training
        tokenizer = training.job.tokenizer() if dist.get_rank() == 0 else None
        try:
            results = self._generations(cursor, training.engine, tokenizer, bool(self._needed_score))
        except RunFailed as error:
            training.end.fail(str(error))
        else:
            self._compare_scores(cursor, results)

    def at_the_end(self, cursor: Cursor, early: bool) -> None:
        """Assess the model after the last step.

        Args:
            cursor: after that step.
            early: True if early stopping ended the training, which has compared this model then.
        """
        end = self._training.end
        if self._evaluator.seen != cursor.step:
            self._evaluate(cursor)
        if early or end.reason:
            return
        self._compare(cursor, self.eval_results)
        resumed = cursor.step == self._training.first_step
        if not end.reason and not (resumed and not self._generations.is_missing(cursor, self._needed_score)):
            self.generate(cursor)

    def is_lacking(self, cursor: Cursor) -> bool:
        """Return True if an evaluation is due after this step, and should be made once the training continues."""
        # Without the deciding metric, it is evaluated again; a missing score of predictions does not matter here.
        compared = self._evaluator.seen == cursor.step and not (self._training.end.failed and not self._needed_score)
        return self._evaluations.is_due(cursor.step) and not compared

    @property
    def _needed_score(self) -> str:
        """The prediction score that decides which model is the best; empty if none does."""
        train = self._training.job.config.train
        return train.best_metric if train.goes_by_predictions else ""

    def _evaluate(self, cursor: Cursor, first: FirstEvaluation | None = None) -> None:
        """Evaluate all sets except those known from ``first``; drop the evaluation if the training should stop meanwhile."""
        try:
            with averaged(self._training.engine):
                self.eval_results = self._evaluator(self._training.engine, cursor, first)
        except EvaluationStopped:
            self._training.stop_as_asked()

    def _compare(self, cursor: Cursor, results: Mapping[str, float]) -> None:
        """Check whether the model after this step is the best so far, by the results of this step's evaluations or predictions.

        The training ends with a checkpoint if they lack the deciding metric.
        """
        end = self._training.end
        keeps = self._training.job.config.train.keep_best and self._stopper.judges(results)
        if keeps and self._evaluator.seen != cursor.step:
            self._evaluate(cursor)  # a model that may be kept has its own results
            if end.reason:
                return
        evaluated = self.eval_results if self._evaluator.seen == cursor.step else {}
        try:
            self._stopper.update({**evaluated, **results}, cursor.step)
        except MetricMissing as error:
            end.fail(str(error))

    def _compare_scores(self, cursor: Cursor, results: Mapping[str, float]) -> None:
        if not self._needed_score or self._training.end.reason:
            return
        self._compare(cursor, results)
        if not self._training.end.reason:
            self._tell_early_stop(cursor)

    def _tell_early_stop(self, cursor: Cursor) -> None:
        best, left = self._stopper.best, cursor.step < self._training.row_plan.steps
        if best and left and self._stopper.should_stop:
            self._training.emit(StoppedEarly(cursor.step, best.metric, best.step, best.value))
