"""The training loop of one worker. It needs a process group and an iterator of batches, and no Ray.

Read ``train`` and ``_Loop.run`` first: everything else is one of their steps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial

import torch
import torch.distributed as dist

from raysft.garbage import resume_collection
from raysft.telemetry.events import Emit, StepSkipped
from raysft.train import step_rows
from raysft.train.assessment import Assessment, early_stopper
from raysft.train.checkpoint import state
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.triggers import CheckpointTrigger
from raysft.train.decisions import Decide, Decision, Outside, shared
from raysft.train.deepspeed_config import zero_stage
from raysft.train.ending import Ending
from raysft.train.evaluator import Evaluator
from raysft.train.export import Exporter
from raysft.train.faults import faults_of
from raysft.train.generation import StepGenerations
from raysft.train.intervals import Interval
from raysft.train.job import Batch, TrainJob
from raysft.train.nonfinite import NonFinite
from raysft.train.phases import Phases, StepTimes
from raysft.train.pixels import Pixels, image_inputs
from raysft.train.read_ahead import ReadAhead
from raysft.train.saving import Checkpoints, Save
from raysft.train.sequence_group import SequenceGroup, group_of
from raysft.train.step import StepResult, train_step
from raysft.train.step_metrics import StepMetrics, setup_done
from raysft.train.stragglers import Stragglers
from raysft.train.training import End, Training
from raysft.train.waiting import Requests, StepRows

ALONE = Outside()
"""For a training run that hears nothing from outside."""
LOG_RECORDS = 1000
"""Number of log records kept in a checkpoint, in case the driver dies before it writes them."""


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
        batches: this worker's rows for each step, starting at the step of ``resume``.
        device: where to compute.
        emit: receives the events; called by the first worker only.
        save: saves a checkpoint; called by all workers.
        resume: the checkpoint to resume from.
        outside: what this worker hears from outside, such as a request to stop.
        phases: told what this worker does.

    Raises:
        RunFailed: the loss or the gradient is not finite; raised by all workers alike.
        Fault: this worker failed otherwise, for example because its rows differ from the row plan.
    """
    phases, rank = phases or Phases(), dist.get_rank()
    emit = emit if rank == 0 else lambda event: None
    share = group_of(rank, dist.get_world_size(), job.config.scaling.sequence_parallel)
    rows = partial(step_rows.current, job.train_rows, phases, *share)
    with faults_of(rank, lambda: phases.moment, rows):
        pixels = Pixels(job.train_rows, job.config.micro_batch_size, phases) if job.train_rows.has_media else None
        with pixels or nullcontext(), ReadAhead(pixels.along(batches) if pixels else batches) as ahead:
            started = time.perf_counter()
            training, cursor = _load(job, device, emit, outside, phases, resume)
            if pixels and training.images:
                pixels.begin(training.images)
            _Loop(training, cursor, save, ahead, started, pixels).run(replace(cursor, identity=job.identity))


def _load(
    job: TrainJob, device: torch.device, emit: Emit, outside: Outside, phases: Phases, resume: ResumePoint | None
) -> tuple[Training, Cursor]:
    """Load the model and the checkpoint; also returns the checkpoint's cursor, to start from."""
    # DeepSpeed takes seconds to import; the driver imports this module too and does not need it.
    from raysft.train.engine import make_engine

    resume_collection()
    seed = job.config.run.seed + dist.get_rank()
    torch.manual_seed(seed)
    steps = job.train_rows.row_plan.steps
    processor, group = job.processor(), SequenceGroup.join(job.config.scaling.sequence_parallel)
    engine, lr_scheduler = make_engine(
        job.config, job.model, dist.get_world_size(), steps, device, job.adapter, job.reference, processor, group
    )
    images = image_inputs(processor, engine.module.model)
    torch.manual_seed(seed)
    cursor = resume.cursor if resume is not None else Cursor(0, 0, 0, job.identity)
    records = state.load(engine, lr_scheduler, resume) if resume is not None else []
    log = deque(records, maxlen=LOG_RECORDS)
    training = Training(
        job, engine, lr_scheduler, device, emit, phases, outside, log, cursor.step, End(), images, group
    )
    return training, cursor


class _Loop:
    """The steps of one worker's training, and what happens between them."""

    def __init__(
        self,
        training: Training,
        resumed: Cursor,
        save: Save,
        ahead: ReadAhead[Batch],
        started: float,
        pixels: Pixels | None,
    ) -> None:
        """
        Args:
            training: with its model loaded.
            resumed: the cursor of the checkpoint; without one, at the first step.
            save: saves a checkpoint.
            ahead: reads this worker's rows.
            started: when the setup started, by ``time.perf_counter``.
            pixels: of the rows; None if no data has images.
        """
        self.pixels = pixels
        job, device, emit, phases = training.job, training.device, training.emit, training.phases
        outside, model = training.outside, training.model
        self.training, self.started = training, started
        self.rank, self.workers, self.group = dist.get_rank(), dist.get_world_size(), training.group
        scheduled = Interval.of_checkpoints(job.config.train, training.row_plan)
        self.trigger = CheckpointTrigger(job.config.train, scheduled, self.rank, outside)
        evaluator = Evaluator(job, device, emit, training.log, self.trigger.stops, phases, training.images, self.group)
        known = evaluator.known(resumed)
        exporter = Exporter(job.run, emit, job.ends)
        self.stopper = early_stopper(training, exporter, resumed)
        self.checkpoints = Checkpoints(training, save, self.trigger, self.stopper)
        self.requests = Requests(training, self.trigger, self.checkpoints)
        self.rows = StepRows(training, ahead, self.requests)
        generations = StepGenerations(
            job, exporter, device, emit, phases, outside.generation, self.requests.hears_the_end
        )
        generations.restored(resumed)
        self.assessment = Assessment(training, evaluator, generations, self.stopper, known)
        self.ending = Ending(training, self.assessment, self.stopper, self.checkpoints, self.trigger, exporter)
        self.nonfinite, self.stragglers = (
            NonFinite(job),
            Stragglers(device, emit, forward_counts=zero_stage(job.config) < 3 and self.group.size == 1),
        )
        self.step_metrics = StepMetrics(training.row_plan, job.train_rows.sources, self.workers, device, model)

    def run(self, cursor: Cursor) -> None:
        """Train from a position to the end of the row plan, or until the training ends early."""
        steps, end = self.training.row_plan.steps, self.training.end
        batch = self.first_rows(cursor)
        if not end.reason:
            self.before_steps(cursor)
        while cursor.step < steps and not self.ends_early:
            cursor = self.step(batch, cursor)
            if cursor.step < steps and not end.reason:
                self.after_step(cursor)
                batch = self.next_rows(cursor)
        if not end.reason:
            self.ending.finish(cursor)
        if end.reason:
            self.ending.stop(cursor)

    @property
    def ends_early(self) -> bool:
        """True if no further step follows."""
        return bool(self.stopper.should_stop or self.training.end.reason)

    def first_rows(self, cursor: Cursor) -> Batch | None:
        """Wait for the first step's rows, report the setup, and start the clocks of the training."""
        self.rows.wait_for_first(cursor)
        training, waited = self.training, self.rows.wait
        seconds = time.perf_counter() - self.started - waited
        log = list(training.log)
        training.emit(setup_done(training.model, training.first_step, self.workers, seconds, waited, log))
        self.started = time.perf_counter()
        self.trigger.start_clock()
        self.rows.own_wait = self.rows.wait = 0.0
        return None if training.end.reason else self.rows.take()

    def before_steps(self, cursor: Cursor) -> None:
        """Assess the untrained model or, when the training resumes, make up for what a stop dropped."""
        if cursor.step == 0:
            self.assessment.before_first_step(cursor)
            return
        cursor, unevaluated = replace(cursor, unevaluated=False), cursor.unevaluated
        missing, ended = self.assessment.resume(cursor), cursor.step >= self.training.row_plan.steps
        if not (self.training.end.reason or ended) and (unevaluated or missing):
            self.after_step(cursor, evaluates=unevaluated, generates=missing)

    def step(self, batch: Batch | None, cursor: Cursor) -> Cursor:
        """Train on one step's rows and log it; returns the cursor after it."""
        training, row_plan, rows, index = self.training, self.training.row_plan, self.rows, cursor.step
        training.phases.enter("forward", index + 1)
        batch = step_rows.checked(
            batch, training.job.train_rows, index, self.rank, self.group.number, self.group.groups
        )
        started = time.perf_counter()
        lr = training.engine.get_lr()[0]
        weight, sources = float(row_plan.step_weight[index]), len(training.job.train_rows.sources)
        result = train_step(
            training.engine,
            batch,
            weight,
            sources,
            lambda: (*self.trigger.requests(), not rows.ready),
            training.phases,
            self.pixels,
            float(row_plan.step_tokens[index]),
            self.group,
        )
        # Pixels are part of the rows, so waiting for them is waiting for rows.
        waited, own_wait = rows.wait + result.held_seconds, rows.own_wait + result.pixel_seconds
        seconds = time.perf_counter() - started - result.held_seconds
        if not result.applied:
            self._skip(index, result)
        tokens = cursor.tokens + int(row_plan.step_tokens[index])
        cursor = Cursor(index + 1, row_plan.consumed(index + 1), tokens, cursor.identity)
        elapsed = time.perf_counter() - self.started
        remaining = (row_plan.steps - cursor.step) * elapsed / (cursor.step - training.first_step)
        rows.are_late = result.rows_are_late
        self.requests.heard(cursor, result.noticed, result.late, result.over)
        record = self.step_metrics.record(cursor, result, lr, seconds, waited, elapsed, remaining)
        training.log.append(asdict(record))
        training.emit(record)
        training.phases.step_took(StepTimes(seconds, own_wait, result.forward_seconds))
        self.stragglers.after_step(record, own_wait, result.forward_seconds)
        return cursor

    def _skip(self, index: int, result: StepResult) -> None:
        """Report a step that was not applied, and advance the learning rate anyway."""
        if reason := self.nonfinite.check(index, result):
            self.training.emit(StepSkipped(index + 1, reason))
        if not self.training.engine.was_step_applied():
            self.training.lr_scheduler.step()  # DeepSpeed leaves it alone, but it must end with the run

    def after_step(self, cursor: Cursor, evaluates: bool = True, generates: bool = True) -> None:
        """Evaluate, generate and save a checkpoint if they are due; ``Ending.finish`` does it after the last step."""
        end, decide = self.training.end, self.training.outside.decide
        if evaluates and self.assessment.evaluate_if_due(cursor) and decide:
            self._follow(decide, cursor)
        if generates and not end.reason:
            self.assessment.generate(cursor)
        if not end.reason:
            self.checkpoints.save_if_due(cursor)

    def _follow(self, decide: Decide, cursor: Cursor) -> None:
        """Do what the scheduler decides after an evaluation."""
        self.training.phases.enter("decision")
        while (decision := shared(decide, cursor.step, self.training.device)) is Decision.SAVE:
            self.checkpoints.save(cursor)
        if decision is Decision.STOP:
            self.training.end.reason = "the scheduler stopped it"

    def next_rows(self, cursor: Cursor) -> Batch | None:
        """Wait for the next step's rows; ends without them if the training is to end."""
        if self.ends_early:
            return None
        self.rows.wait_for_next(cursor)
        if self.training.end.reason:
            return None
        self.training.phases.enter("data", cursor.step + 1)
        return self.rows.take()
