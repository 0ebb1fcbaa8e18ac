"""The training loop of one worker. It needs a process group and an iterator of batches, and no Ray.

Read ``train`` and ``_train`` first: everything else is a step of theirs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from raysft.errors import RunFailed
from raysft.garbage import resume_collection
from raysft.telemetry.events import (
    Emit,
    PreemptionNotice,
    StepSkipped,
    StoppedEarly,
    TrainingEnded,
    TrainingStopped,
)
from raysft.train import step_rows
from raysft.train.averaging import averaged, averages
from raysft.train.checkpoint import state
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.triggers import CheckpointTrigger
from raysft.train.decisions import Decide, Decision, Outside, any_worker, from_first, shared
from raysft.train.deepspeed_config import zero_stage
from raysft.train.early_stopping import EarlyStopper, MetricMissing, known_best
from raysft.train.evaluator import Evaluator
from raysft.train.export import Exporter
from raysft.train.first_evaluation import FirstEvaluation
from raysft.train.generation import StepGenerations
from raysft.train.intervals import Interval
from raysft.train.job import Batch, RowPlan, TrainJob
from raysft.train.nonfinite import NonFinite
from raysft.train.phases import Phase, Phases, StepTimes
from raysft.train.read_ahead import ReadAhead
from raysft.train.restarts import faults_of
from raysft.train.step import EvaluationStopped, StepResult, train_step
from raysft.train.step_metrics import StepMetrics, setup_done, training_results
from raysft.train.stragglers import Stragglers
from raysft.train.watched_write import Watch, watched

Save = Callable[[Any, Cursor, list[dict[str, Any]]], None]
"""Saves a checkpoint: (engine, cursor, latest log records)."""
ALONE = Outside()
"""A training that hears nothing from outside."""
LOOK_SECONDS = 1.0
"""Time between two looks for a request to stop while a worker waits for its rows."""
LOG_RECORDS = 1000
"""Log records in a checkpoint, for a driver that died before it wrote them."""


def train(
    job: TrainJob,
    batches: Iterator[Batch],
    device: torch.device,
    emit: Emit,
    save: Save,
    resume: ResumePoint | None = None,
    outside: Outside = ALONE,
    phases: Phases | None = None,
) -> None:
    """Train to the end of the row plan, evaluate, and write the trained model.

    Args:
        job: what to train.
        batches: this worker's rows of each step, from the step of ``resume`` on.
        device: where to compute.
        emit: receives the events; called by the first worker only.
        save: saves a checkpoint; called by all workers.
        resume: the checkpoint to resume from.
        outside: what this worker hears from outside, such as a request to stop.
        phases: told what this worker does.

    Raises:
        RunFailed: loss or gradient are not finite; raised by all workers alike.
        Fault: this worker failed otherwise, for example because its rows differ from the row plan.
    """
    loop = _Loop(job, device, emit, save, outside, phases or Phases())
    rows = partial(step_rows.current, job.train_rows, loop.phases, loop.rank, loop.workers)
    with faults_of(loop.rank, lambda: loop.phases.moment, rows):
        _train(loop, batches, resume)


def _train(loop: _Loop, batches: Iterator[Batch], resume: ResumePoint | None) -> None:
    with ReadAhead(batches) as rows:
        cursor = loop.set_up(resume)
        batch = loop.first_rows(rows, cursor)
        if not loop.stop_reason:
            loop.before_steps(cursor)
        while cursor.step < loop.row_plan.steps and not loop.ends_early:
            cursor = loop.step(batch, cursor, rows)
            if cursor.step < loop.row_plan.steps and not loop.stop_reason:
                loop.after_step(cursor)
                batch = loop.next_rows(rows, cursor)
    if not loop.stop_reason:
        loop.finish(cursor)
    if loop.stop_reason:
        loop.stop(cursor)


class _Loop:
    """State of one worker's training."""

    def __init__(
        self, job: TrainJob, device: torch.device, emit: Emit, save: Save, outside: Outside, phases: Phases
    ) -> None:
        self.job, self.device, self.save, self.outside, self.phases = job, device, save, outside, phases
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.emit: Emit = emit if self.rank == 0 else lambda event: None
        self.log: deque[dict[str, Any]] = deque(maxlen=LOG_RECORDS)
        self.row_plan: RowPlan = job.train_rows.row_plan
        train = job.config.train
        self.evaluations = Interval.of_evaluations(train, self.row_plan)
        self.trigger = CheckpointTrigger(train, Interval.of_checkpoints(train, self.row_plan), self.rank, outside)
        self.data_wait = 0.0
        """Seconds that this worker waited for its rows of the current step."""
        self.rows_wait = 0.0
        """Seconds that all workers waited until each had its rows of the current step."""
        self.rows_are_late = False
        """True if any worker did not have the rows of the next step at the end of the last one."""
        self.first_step = self.saved_step = 0
        self.stop_reason = ""
        """Why the training ends before the end of its row plan; empty if it goes on."""
        self.failed = False
        """True if it ends because it cannot go on as it was asked to."""
        self.eval_results: dict[str, float] = {}
        """Results of the latest evaluation."""
        self.evaluator = Evaluator(job, device, self.emit, self.log, self.trigger.stops, phases)
        self.stragglers = Stragglers(device, self.emit, zero_stage(job.config) < 3)
        self.nonfinite = NonFinite(job)
        self.exporter = Exporter(job.run, emit, job.ends)
        self.generations = StepGenerations(
            job, self.exporter, device, self.emit, phases, outside.generation, self.hears_the_end
        )

    def set_up(self, resume: ResumePoint | None) -> Cursor:
        """Load the model and the checkpoint; returns the cursor to start from."""
        # DeepSpeed takes seconds to import; the driver imports this module too and does not need it.
        from raysft.train.engine import make_engine

        resume_collection()
        self.started = time.perf_counter()
        torch.manual_seed(self.job.config.run.seed + self.rank)
        self.engine, self.lr_scheduler = make_engine(
            self.job.config,
            self.job.model,
            self.workers,
            self.row_plan.steps,
            self.device,
            self.job.adapter,
            self.job.reference,
        )
        torch.manual_seed(self.job.config.run.seed + self.rank)
        cursor = Cursor(0, 0, 0, self.job.identity)
        if resume is not None:
            cursor = resume.cursor
            self.generations.restored(cursor)
            self.log.extend(state.load(self.engine, self.lr_scheduler, resume))
            self.eval_results = self.evaluator.known(cursor)
        best = known_best(self.job.config.train, cursor, self.job.identity)
        if self.job.config.train.keep_best:
            best = self.exporter.confirm_best(best)
        self.early_stopper = EarlyStopper(self.job.config.train, self._keep_best, best)
        model = self.engine.module.model
        self.step_metrics = StepMetrics(self.row_plan, self.job.train_rows.sources, self.workers, self.device, model)
        self.first_step = cursor.step
        return replace(cursor, identity=self.job.identity)

    def emit_setup(self, data_wait: float) -> None:
        """Report the setup and its time, and start the clocks of the training."""
        seconds = time.perf_counter() - self.started - data_wait
        self.emit(setup_done(self.engine.module, self.first_step, self.workers, seconds, data_wait, list(self.log)))
        self.started = time.perf_counter()
        self.trigger.start_clock()

    @property
    def ends_early(self) -> bool:
        """True if no further step follows."""
        return bool(self.early_stopper.should_stop or self.stop_reason)

    def step(self, batch: Batch | None, cursor: Cursor, rows: ReadAhead[Batch]) -> Cursor:
        """Train on one step's rows and log it; returns the cursor after it."""
        index = cursor.step
        self.phases.enter("forward", index + 1)
        batch = step_rows.checked(batch, self.job.train_rows, index, self.rank, self.workers)
        started = time.perf_counter()
        lr = self.engine.get_lr()[0]
        weight, sources = float(self.row_plan.step_weight[index]), len(self.job.train_rows.sources)
        result = train_step(
            self.engine, batch, weight, sources, lambda: (*self.trigger.requests(), not rows.ready), self.phases
        )
        seconds = time.perf_counter() - started
        if not result.applied:
            self._skip(index, result)
        tokens = cursor.tokens + int(self.row_plan.step_tokens[index])
        cursor = Cursor(index + 1, self.row_plan.consumed(index + 1), tokens, cursor.identity)
        elapsed = time.perf_counter() - self.started
        remaining = (self.row_plan.steps - cursor.step) * elapsed / (cursor.step - self.first_step)
        self.rows_are_late = result.rows_are_late
        self._heard(cursor, result.noticed, result.late, result.over)
        record = self.step_metrics.record(cursor, result, lr, seconds, self.rows_wait, elapsed, remaining)
        self.log.append(asdict(record))
        self.emit(record)
        self.phases.step_took(StepTimes(seconds, self.data_wait, result.forward_seconds))
        self.stragglers.after_step(record, self.data_wait, result.forward_seconds)
        return cursor

    def first_rows(self, rows: ReadAhead[Batch], cursor: Cursor) -> Batch | None:
        """Wait for the first step's rows, which is a part of the setup, and report the setup."""
        (self.rows_are_late,) = any_worker(not rows.ready, device=self.device)
        self._wait_for(rows, cursor)
        self.emit_setup(self.rows_wait)
        self.data_wait = self.rows_wait = 0.0
        return None if self.stop_reason else rows.take()

    def before_steps(self, cursor: Cursor) -> None:
        """Evaluate the untrained model, or make up for the evaluation that a stop dropped."""
        if cursor.step == 0:
            self.generations.resume(cursor)
            if self.job.config.train.eval_at_start:
                self.evaluate(cursor, FirstEvaluation.find(self.job, self.device))
        else:
            self._make_up(replace(cursor, unevaluated=False), cursor.unevaluated)

    def _make_up(self, cursor: Cursor, unevaluated: bool) -> None:
        """Do where the training resumes what a stop dropped after that step."""
        results = self.generations.resume(cursor, bool(self._needed_score))
        missing, ended = self.generations.is_missing(cursor, self._needed_score), cursor.step >= self.row_plan.steps
        if self._needed_score and not (self.stop_reason or missing) and self.generations.is_due(cursor.step):
            # A remote run keeps the scores of this moment only after the workers hear of them.
            self._compare_scores(cursor, results or self.generations.results(cursor.step))
        if not (self.stop_reason or ended) and (unevaluated or missing):
            self.after_step(cursor, evaluates=unevaluated, generates=missing)

    def next_rows(self, rows: ReadAhead[Batch], cursor: Cursor) -> Batch | None:
        """Wait for the next step's rows; ends without them if the training is to end."""
        if self.ends_early:
            return None
        self._wait_for(rows, cursor)
        if self.stop_reason:
            return None
        self.phases.enter("data", cursor.step + 1)
        return rows.take()

    def _wait_for(self, rows: ReadAhead[Batch], cursor: Cursor) -> None:
        """Wait until all workers have their rows, or the training is to end.

        They may never come: Ray starts no tasks on a node that it drains, and those that read rows may have no other. So while any
        worker waits for its rows, all of them look together for what was asked. A worker whose rows cannot be read does not wait
        for those of the others.
        """
        self.data_wait, self.rows_wait, late = 0.0, 0.0, self.rows_are_late
        while late and not rows.failed and not self.stop_reason:
            self._wait_in("step" if rows.ready else "data", cursor.step + 1)
            waiting_since = time.perf_counter()
            rows.wait(LOOK_SECONDS)
            self.data_wait += time.perf_counter() - waiting_since
            (late,) = self._look(cursor, not rows.ready)
            self.rows_wait += time.perf_counter() - waiting_since

    def _look(self, cursor: Cursor, *more: bool) -> list[bool]:
        """Do together what any worker was asked for while all wait; returns for each further value whether any worker says so."""
        noticed, late, over, *others = any_worker(*self.trigger.requests(), *more, device=self.device)
        trained = cursor.step > self.first_step  # else there is nothing to save, and the first step will hear it
        self._heard(cursor, noticed and trained, late and trained, over)
        if trained and not self.stop_reason:
            self._checkpoint_if_due(cursor)
        return others

    def hears_the_end(self, cursor: Cursor) -> bool:
        """Look for what is asked, and return True if the training is to end."""
        self._look(cursor)
        return bool(self.stop_reason)

    def _wait_in(self, phase: Phase, step: int) -> None:
        """Tell the watchdog whom all wait for; a wait that goes on is no progress. The first rows belong to the setup."""
        if self.phases.phase != "setup" and (self.phases.phase != phase or self.phases.step != step):
            self.phases.enter(phase, step)

    def _heard(self, cursor: Cursor, noticed: bool, late: bool, over: bool) -> None:
        """Do what any worker heard from outside."""
        if self.trigger.update(cursor.step, noticed, late):
            self.emit(PreemptionNotice(cursor.step, self.outside.preemption_reason()))
        if over:
            self._asked_to_stop()

    def _skip(self, index: int, result: StepResult) -> None:
        """Report a step that was not applied, and advance the learning rate all the same."""
        if reason := self.nonfinite.check(index, result):
            self.emit(StepSkipped(index + 1, reason))
        if not self.engine.was_step_applied():
            self.lr_scheduler.step()  # DeepSpeed leaves it unchanged, but it must end with the run

    def after_step(self, cursor: Cursor, evaluates: bool = True, generates: bool = True) -> None:
        """Evaluate, generate and save a checkpoint if they are due. ``finish`` does it after the last step."""
        if evaluates and self.evaluations.is_due(cursor.step):
            self.evaluate(cursor)
            if self.stop_reason:
                return
            self.compare(cursor, self.eval_results)
            if self.stop_reason:
                return
            if self.early_stopper.should_stop:
                self._tell_early_stop(cursor)
            if self.outside.decide:
                self._follow(self.outside.decide, cursor)
        if generates and not self.stop_reason:
            self.generate(cursor)
        if not self.stop_reason:
            self._checkpoint_if_due(cursor)

    def generate(self, cursor: Cursor) -> None:
        """Have the model of this step predict, if that is due; wait for predictions as far as the training has to."""
        if not self.generations.is_due(cursor.step):
            return self.generations.after_step(cursor)
        tokenizer = self.job.tokenizer() if self.rank == 0 else None
        try:
            results = self.generations(cursor, self.engine, tokenizer, bool(self._needed_score))
        except RunFailed as error:
            self.stop_reason, self.failed = str(error), True
        else:
            self._compare_scores(cursor, results)

    @property
    def _needed_score(self) -> str:
        """The score of predictions that decides which model is the best; empty if none does."""
        metric = self.job.config.train.best_metric
        return metric if self.early_stopper.active and metric.startswith("predict_") else ""

    def _compare_scores(self, cursor: Cursor, results: Mapping[str, float]) -> None:
        if not self._needed_score or self.stop_reason:
            return
        self.compare(cursor, results)
        if not self.stop_reason and self.early_stopper.should_stop:
            self._tell_early_stop(cursor)

    def _tell_early_stop(self, cursor: Cursor) -> None:
        if best := self.early_stopper.best:
            self.emit(StoppedEarly(cursor.step, best.metric, best.step, best.value))

    def _checkpoint_if_due(self, cursor: Cursor) -> None:
        if self.trigger.is_due(cursor.step) and self.saved_step != cursor.step:
            self._checkpoint(replace(cursor, temporary=not self.trigger.is_scheduled(cursor.step)))

    def _follow(self, decide: Decide, cursor: Cursor) -> None:
        """Do what the scheduler decides after an evaluation."""
        self.phases.enter("decision")
        while (decision := shared(decide, cursor.step, self.device)) is Decision.SAVE:
            self._checkpoint(cursor)
        if decision is Decision.STOP:
            self.stop_reason = "the scheduler stopped it"

    def evaluate(self, cursor: Cursor, first: FirstEvaluation | None = None) -> None:
        """Evaluate all sets but those known from ``first``; drop that if the training is to stop meanwhile."""
        try:
            with averaged(self.engine):
                self.eval_results = self.evaluator(self.engine, cursor, first)
        except EvaluationStopped:
            self._asked_to_stop()

    def compare(self, cursor: Cursor, results: Mapping[str, float]) -> None:
        """Look whether the model after this step is the best so far, by the results of evaluations or predictions of this step.

        The training ends with a checkpoint if they lack the metric that is to decide.
        """
        keeps = self.job.config.train.keep_best and self.early_stopper.judges(results)
        if keeps and self.evaluator.seen != cursor.step:
            self.evaluate(cursor)  # a model that may be kept has results of its own
            if self.stop_reason:
                return
        try:
            self.early_stopper.update({**self._evaluated(cursor), **results}, cursor.step)
        except MetricMissing as error:
            self.stop_reason, self.failed = str(error), True

    def _evaluated(self, cursor: Cursor) -> dict[str, float]:
        """Results of the evaluation after this step; empty if there was none."""
        return self.eval_results if self.evaluator.seen == cursor.step else {}

    def _asked_to_stop(self) -> None:
        self.stop_reason = self.outside.stop_reason() or "another worker was asked to stop"

    def _checkpoint(self, cursor: Cursor) -> None:
        self.phases.enter("checkpoint", cursor.step)
        self.save(self.engine, replace(cursor, best=self.early_stopper.best), list(self.log))
        self.saved_step = cursor.step
        self.trigger.start_clock()

    def stop(self, cursor: Cursor) -> None:
        """End before the end, with a checkpoint to go on from."""
        if self._is_unsaved(cursor):
            # Without the metric that decides, it is evaluated again; the lack of a score of predictions is none of its own.
            compared = self.evaluator.seen == cursor.step and not (self.failed and not self._needed_score)
            unevaluated = self.evaluations.is_due(cursor.step) and not compared
            kept = self.trigger.is_scheduled(cursor.step) and not unevaluated
            self._checkpoint(replace(cursor, temporary=not kept, unevaluated=unevaluated))
        self.emit(TrainingStopped(cursor.step, self.stop_reason, self.eval_results, self.failed))

    def _is_unsaved(self, cursor: Cursor) -> bool:
        """Return True if a checkpoint would keep steps from being repeated."""
        return self.job.config.train.resumes and cursor.step > self.first_step and self.saved_step != cursor.step

    def _save(self, cursor: Cursor) -> None:
        """Save the end of the training while its model is written."""
        if self._is_unsaved(cursor):
            self._checkpoint(replace(cursor, temporary=True))
            self.phases.enter("export")

    def finish(self, cursor: Cursor) -> None:
        """Evaluate, save the last checkpoint, write the model, and report the results; nothing of it if it is to stop meanwhile."""
        results: dict[str, Any] = training_results(self.row_plan, cursor, self.engine.module.model)
        early = cursor.step < self.row_plan.steps
        if self.evaluator.seen != cursor.step:
            self.evaluate(cursor)
        if not early and not self.stop_reason:
            self.compare(cursor, self.eval_results)
            resumed = cursor.step == self.first_step
            if not self.stop_reason and not (resumed and not self.generations.is_missing(cursor, self._needed_score)):
                self.generate(cursor)
        if self.stop_reason:
            return
        if early:
            results["planned_steps"] = self.row_plan.steps
        if any(from_first(self.trigger.stops(), device=self.device)):
            self._asked_to_stop()
            return
        if self.job.config.train.saves_on_schedule and cursor.step > self.first_step:
            self._checkpoint(cursor)  # a longer training that resumes here must know the last evaluation
        elif averages(self.engine):
            self._save(cursor)  # while the model is written, the weights are not those that are trained
        watch: Watch = partial(watched, asked=self.trigger.stops, react=partial(self._save, cursor), device=self.device)
        best = self.early_stopper.best
        if best and best.value is not None:
            results |= {"best_step": best.step, f"best_{best.metric}": best.value}
        if best and best.value is not None and self.job.config.train.keep_best:
            self.eval_results = {name: value for name, value in best.results.items() if name.startswith("eval_")}
            self.exporter.promote_best(best.step, watch)
        else:
            self._export(partial(self.exporter.write, watch=watch))
        self.emit(TrainingEnded(results, self.eval_results))

    def _keep_best(self) -> None:
        assert self.early_stopper.best
        self._export(partial(self.exporter.save_best, self.early_stopper.best.step))

    def _export(self, write: Callable[[Any, Any], None]) -> None:
        """Write the current model and its tokenizer."""
        self.phases.enter("export")
        with averaged(self.engine):
            write(self.engine.module.model, self.job.tokenizer())
