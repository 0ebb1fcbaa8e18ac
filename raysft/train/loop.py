"""The worker's loop. It needs a process group and an iterator of batches, and no Ray."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.storage.local_cache import local_copy
from raysft.telemetry.events import (
    Emit,
    EvaluationDone,
    PreemptionNotice,
    SetupDone,
    StepSkipped,
    StoppedEarly,
    TrainingEnded,
    evaluation_results,
)
from raysft.train.checkpoint import format
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.triggers import Due, Notice
from raysft.train.deepspeed_config import size
from raysft.train.early_stopping import EarlyStopper, known_best
from raysft.train.export import Exporter
from raysft.train.job import Batch, RowPlan, TrainJob
from raysft.train.nonfinite import NonFinite, named_records
from raysft.train.restarts import faults_of
from raysft.train.step import evaluate, train_step
from raysft.train.step_metrics import StepMetrics

Save = Callable[[Any, Cursor, list[dict[str, Any]]], None]
"""Keeps the state of an engine at a cursor, with the latest records of the log."""
LOGGED = 1000
"""Records of the log that a checkpoint holds, for a driver that died before it wrote them."""


def train(
    job: TrainJob,
    batches: Iterator[Batch],
    device: torch.device,
    emit: Emit,
    save: Save,
    resume: ResumePoint | None = None,
    notice: Notice = str,
) -> None:
    """Train to the end of the row plan, evaluate, and write the trained model.

    Args:
        job: what to do.
        batches: this worker's rows of each step, from that of ``resume`` on.
        device: where to compute.
        emit: takes the events; only the first worker calls it.
        save: keeps a checkpoint; all workers call it.
        resume: checkpoint to go on from.
        notice: says when machines are about to be taken away: a checkpoint is written then.

    Raises:
        RunFailed: loss or gradient are not finite; on all workers alike.
        Fault: this worker failed otherwise, for example because rows come in another order than planned.
    """
    loop = _Loop(job, device, emit, save, notice)
    with faults_of(loop.rank, lambda: loop.moment, loop.rows_at_hand):
        _train(loop, batches, resume)


def _train(loop: _Loop, batches: Iterator[Batch], resume: ResumePoint | None) -> None:
    with ThreadPoolExecutor(1) as ahead:
        # The first rows are read while the model is loaded.
        first_batch = ahead.submit(next, batches, None)
        cursor = loop.set_up(resume)
        waiting = time.perf_counter()
        batch = first_batch.result()
    loop.emit_setup(time.perf_counter() - waiting)
    if cursor.step == 0 and loop.job.config.train.eval_at_start:
        loop.evaluate(cursor)
    while cursor.step < loop.row_plan.steps and not loop.early_stopper.should_stop:
        cursor = loop.step(batch, cursor)
        if cursor.step < loop.row_plan.steps:
            asked, loop.moment = time.perf_counter(), f"reading the rows of step {cursor.step + 1}"
            batch = next(batches, None)
            loop.data_wait = time.perf_counter() - asked
            loop.after_step(cursor)
    loop.finish(cursor)


class _Loop:
    """State of one worker's training."""

    def __init__(self, job: TrainJob, device: torch.device, emit: Emit, save: Save, notice: Notice) -> None:
        self.job, self.device, self.save = job, device, save
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.due = Due(job.config.train, self.rank, notice)
        self.emit: Emit = emit if self.rank == 0 else lambda event: None
        self.log: deque[dict[str, Any]] = deque(maxlen=LOGGED)
        self.row_plan: RowPlan = job.train_rows.row_plan
        self.data_wait = 0.0
        self.moment = "the setup"
        """What it is at, for people."""
        self.first = 0
        self.evaluated: dict[str, float] = {}
        self.nonfinite = NonFinite(job)
        self.exporter = Exporter(job.run, emit, job.ends)

    def set_up(self, resume: ResumePoint | None) -> Cursor:
        """Load the model, and the state of a checkpoint; gives the cursor to start from."""
        # Only workers need DeepSpeed; the driver, which imports this module too, starts without it.
        from raysft.train.engine import make_engine

        self.started = time.perf_counter()
        torch.manual_seed(self.job.config.run.seed + self.rank)
        self.engine, self.lr = make_engine(
            self.job.config, self.job.model, self.workers, self.row_plan.steps, self.device, self.job.adapter
        )
        torch.manual_seed(self.job.config.run.seed + self.rank)
        cursor = Cursor(0, 0, 0, self.job.identity)
        if resume is not None:
            cursor = resume.cursor
            self.log.extend(format.load(self.engine, self.lr, resume))
        best = known_best(self.job.config.train, cursor, self.job.identity)
        if self.job.config.train.keep_best:
            best = self.exporter.known(best)
        cursor = replace(cursor, identity=self.job.identity)
        self.early_stopper = EarlyStopper(self.job.config.train, self._keep_best, best)
        names, model = self.job.train_rows.sources, self.engine.module.model
        self.figures = StepMetrics(self.row_plan, names, self.workers, self.device, model)
        self.first = cursor.step
        return cursor

    def emit_setup(self, data_wait: float) -> None:
        """Say where the time before the first step went."""
        now = time.perf_counter()
        parameters = list(self.engine.module.parameters())
        self.emit(
            SetupDone(
                step=self.first,
                workers=self.workers,
                model_seconds=now - self.started - data_wait,
                data_wait_seconds=data_wait,
                parameters=sum(size(p) for p in parameters),
                trained_parameters=sum(size(p) for p in parameters if p.requires_grad),
                log=list(self.log),
            )
        )
        self.started = time.perf_counter()
        self.due.start_clock()

    def step(self, batch: Batch | None, cursor: Cursor) -> Cursor:
        """Train on one step's rows and log it; gives the cursor after it."""
        index = cursor.step
        self.moment = f"step {index + 1}"
        expected = self.job.train_rows.rows_for_rank(index, self.rank, self.workers)
        if batch is None or not np.array_equal(batch["row"], expected):
            came = "no rows" if batch is None else f"rows {batch['row'].tolist()}"
            # One worker's trouble, unlike what RunFailed says: Ray Train starts all again from the checkpoint.
            raise RuntimeError(
                f"step {index + 1}: worker {self.rank} was to get rows {expected.tolist()} and got {came}"
            )
        begun = time.perf_counter()
        lr = self.engine.get_lr()[0]
        weight, sources = float(self.row_plan.step_weight[index]), len(self.job.train_rows.sources)
        trained = train_step(self.engine, batch, weight, sources, self.due.asks)
        seconds = time.perf_counter() - begun
        if not trained.applied:
            what = self.nonfinite.check(index, trained)
            if what:
                self.emit(StepSkipped(index + 1, what))
            if not self.engine.was_step_applied():
                self.lr.step()  # DeepSpeed leaves the LR scheduler unchanged; it has to end with the run
        tokens = int(self.row_plan.step_tokens[index])
        cursor = Cursor(index + 1, self.row_plan.consumed(index + 1), cursor.tokens + tokens, cursor.identity)
        elapsed = time.perf_counter() - self.started
        left = (self.row_plan.steps - cursor.step) * elapsed / (cursor.step - self.first)
        if self.due.hear(cursor.step, trained.noticed, trained.late):
            self.emit(PreemptionNotice(cursor.step, self.due.notice()))
        record = self.figures.record(cursor, trained, lr, seconds, self.data_wait, elapsed, left)
        self.log.append(asdict(record))
        self.emit(record)
        return cursor

    def rows_at_hand(self) -> str:
        """Which rows this worker has in the step that it is at, and where they come from."""
        at, _, step = self.moment.partition(" ")
        if at != "step":
            return ""
        shares = self.job.train_rows.rows_for_rank(int(step) - 1, self.rank, self.workers).tolist()
        rows = [row for row in shares if row >= 0]
        return f"its rows {', '.join(map(str, rows))} hold {named_records(self.job.train_rows, rows)}" if rows else ""

    def after_step(self, cursor: Cursor) -> None:
        """What is due every so many steps; the last step's is done by ``finish``."""
        train = self.job.config.train
        if train.eval_every_steps and cursor.step % train.eval_every_steps == 0:
            self.evaluated = self.evaluate(cursor)
            self.early_stopper.update(self.evaluated, cursor.step)
            best = self.early_stopper.best
            if self.early_stopper.should_stop and best:
                self.emit(StoppedEarly(cursor.step, best.step, best.loss))
        if self.due.after(cursor.step):
            self._checkpoint(replace(cursor, passing=not self.due.by_steps(cursor.step)))

    def evaluate(self, cursor: Cursor) -> dict[str, float]:
        """Evaluate all sets and log it; gives the results."""
        self.moment = f"the evaluation after step {cursor.step}"
        rows = self.job.config.train.micro_batch_size
        evaluations = [
            evaluate(self.engine, name, cursor.step, source.steps(0, self.rank, self.workers), rows, self.device)
            for name, source in self.job.eval_rows.items()
        ]
        results = evaluation_results(evaluations)
        if results:
            record = {
                "current_steps": cursor.step,
                "total_steps": self.row_plan.steps,
                "epoch": round(self.row_plan.epoch_of(cursor.rows), 4),
                "percentage": round(100 * cursor.step / self.row_plan.steps, 2),
                **results,
            }
            self.log.append(record)
            self.emit(EvaluationDone(record))
        return results

    def _checkpoint(self, cursor: Cursor) -> None:
        self.save(self.engine, replace(cursor, best=self.early_stopper.best), list(self.log))
        self.due.start_clock()

    def finish(self, cursor: Cursor) -> None:
        """Evaluate, write the model, and say how it went."""
        results: dict[str, Any] = {
            "total_steps": cursor.step,
            "total_rows": cursor.rows,
            "total_tokens": cursor.tokens,
            "epoch": round(self.row_plan.epoch_of(cursor.rows), 4),
        }
        if cursor.step < self.row_plan.steps:
            results["planned_steps"] = self.row_plan.steps
            self.evaluated = self.evaluated or self.evaluate(cursor)
        else:
            self.evaluated = self.evaluate(cursor)
            self.early_stopper.update(self.evaluated, cursor.step)
        if self.job.config.train.save_every_steps and cursor.step > self.first:
            self._checkpoint(cursor)  # who trains on has to know of the last evaluation
        best = self.early_stopper.best
        if best:
            results |= {"best_step": best.step, "best_eval_loss": best.loss}
        if best and self.job.config.train.keep_best:
            self.evaluated = best.results
            self.exporter.write_best(best.step)
        else:
            self._export(self.exporter.write)
        self.emit(TrainingEnded(results, self.evaluated))

    def _keep_best(self) -> None:
        assert self.early_stopper.best
        self._export(partial(self.exporter.keep_best, self.early_stopper.best.step))

    def _export(self, write: Callable[[Any, Any], None]) -> None:
        """Write the model as it is now."""
        self.moment = "writing the model"
        from transformers import AutoTokenizer

        near, trusted = local_copy(self.job.model), self.job.config.model.runs_code
        tokenizer = AutoTokenizer.from_pretrained(near, trust_remote_code=trusted)
        tokenizer.chat_template = self.job.config.chat_template or tokenizer.chat_template
        write(self.engine.module.model, tokenizer)
