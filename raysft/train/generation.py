"""Generation during training, as the workers see it: write the model of a step, ask for its predictions, and wait if they must.

The driver generates (``run.step_generation``), by engines that either find room alongside the workers or use the devices of
workers that wait meanwhile. At most one model generates at a time, so that models do not pile up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from raysft.errors import RunFailed
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import GENERATION, is_complete
from raysft.telemetry.events import Emit, GenerationNotice
from raysft.train.averaging import averaged
from raysft.train.checkpoint.cursor import PREDICTION, Cursor
from raysft.train.decisions import from_first
from raysft.train.export import Exporter
from raysft.train.generation_line import GenerationDue, GenerationState, Line, Place, Status
from raysft.train.intervals import Interval
from raysft.train.job import TrainJob
from raysft.train.phases import Phases

LOOK_SECONDS = 1.0
"""Time between two checks by workers that wait for predictions; without GPUs, news wakes them at once."""


class StepGenerations:
    """Generation during one worker's training. All workers call its methods together."""

    def __init__(
        self,
        job: TrainJob,
        exporter: Exporter,
        device: torch.device,
        emit: Emit,
        phases: Phases,
        line: Line | None,
        stopping: Callable[[Cursor], bool],
    ) -> None:
        """
        Args:
            job: what is trained.
            exporter: writes the model.
            device: for the collectives.
            emit: receives ``GenerationNotice``.
            phases: told what this worker does.
            line: to the driver; None if nobody generates.
            stopping: a collective: does what was asked of the workers while they wait, and returns True if the training should end.
        """
        self._job, self._exporter, self._device, self._emit = job, exporter, device, emit
        self._phases, self._line, self._stopping = phases, line, stopping
        every = job.config.generate.every_steps if line is not None else None
        self._due = Interval(job.train_rows.row_plan, every, None)
        self._asked: GenerationDue | None = None
        """The request whose outcome is not known yet; on workers other than the first, without what only the first one knows."""
        self._told_wait = False
        self._other_settings = False
        """True if an earlier process predicted other prompts or with other settings: its scores do not belong to this training."""

    def restored(self, cursor: Cursor) -> None:
        """Process the cursor of the checkpoint that the training resumes from, as it was written."""
        self._other_settings = cursor.identity.get(PREDICTION) != self._job.identity.get(PREDICTION)

    def is_due(self, step: int) -> bool:
        """Return True if predictions are due after a step."""
        return self._line is not None and self._due.is_due(step)

    def resume(self, cursor: Cursor, needed: bool = False) -> dict[str, float]:
        """Ask again for predictions that an earlier process did not complete; later steps are repeated, and ask on their own.

        Args:
            cursor: where the training resumes.
            needed: wait for the scores.

        Returns:
            The scores of the cursor's step, if this call waited for them.
        """
        if self._line is None:
            return {}
        left: list[int] = self._shared(self._left(cursor.step) if dist.get_rank() == 0 else None)
        for step in left:
            if self._asked is not None and not self._settle_last(cursor):
                return {}
            self._ask(step, self._job.generation_pauses)
        if not left or not (needed or self._job.generation_pauses):
            return {}
        state = self._wait(cursor)
        return state.results if state is not None and left[-1] == cursor.step else {}

    def _left(self, last: int) -> list[int]:
        """Return the steps up to the last one whose predictions are not complete; drop what exists of later ones."""
        steps = sorted(int(name) for name in (self._job.run.place / GENERATION).entries() if name.isdigit())
        for step in steps:
            if step > last:  # its predictions stay, and are reused if the repeated step has the same model
                self._job.run.step_model(step).remove()
                self._results(step).remove()
        return [step for step in steps if step <= last and is_complete(self._job.run.step_model(step))]

    def is_missing(self, cursor: Cursor, metric: str = "") -> bool:
        """Return True if predictions are due where the training resumes, but it was stopped before they began.

        Args:
            cursor: where the training resumes.
            metric: a score that they must have: an earlier process may have used other metrics.
        """
        if not self.is_due(cursor.step):
            return False
        return self._shared(dist.get_rank() == 0 and not self._begun(cursor.step, metric))

    def _begun(self, step: int, metric: str) -> bool:
        # The model is removed once there are results.
        if is_complete(self._job.run.step_model(step)):
            return True
        known = self._known(step)
        return metric in known if metric else bool(known)

    def _results(self, step: int) -> StoragePath:
        """The file of a step's scores; on machines other than the driver's, a remote run has no local one."""
        generation = self._job.run.generation(step)
        return generation.place / generation.results("predict").name

    def __call__(self, cursor: Cursor, engine: Any, tokenizer: Any, needed: bool = False) -> dict[str, float]:
        """Ask for predictions of the current model.

        Args:
            cursor: where the training stands.
            engine: its model; while workers wait they may save a checkpoint, so it then has the trained weights.
            tokenizer: written with it.
            needed: wait for the scores.

        Returns:
            The scores if they are needed; empty if the training should stop meanwhile.

        Raises:
            RunFailed: there are none, but they are needed; raised by all workers alike.
        """
        if self._asked is not None and not self._settle_last(cursor):
            return {}
        self._phases.enter("export", cursor.step)
        with averaged(engine):
            failure = self._exporter.save_snapshot(
                self._job.run.step_model(cursor.step), engine.module.model, tokenizer
            )
        if failure is not None:
            if needed:
                raise failure
            fact, _, _ = str(failure).partition(";")
            self._emit(GenerationNotice(cursor.step, f"{fact}; training continues without them"))
            return {}
        pauses = self._job.generation_pauses
        self._ask(cursor.step, pauses)
        if not (pauses or needed):
            return {}
        state = self._wait(cursor)
        if state is None:
            return {}
        if needed and state.status is Status.FAILED:
            raise RunFailed(
                f"train.best_metric={self._job.config.train.best_metric} needs predictions after step {cursor.step}, but "
                f"{state.failure}; run the same command to try again"
            )
        return state.results

    def results(self, step: int) -> dict[str, float]:
        """Return the scores of a step that an earlier process completed; empty if it did not."""
        return self._shared(self._known(step) if dist.get_rank() == 0 else None)

    def _known(self, step: int) -> dict[str, float]:
        if self._other_settings:
            return {}
        return json.loads(self._results(step).read_bytes()) if self._results(step).exists() else {}

    def after_step(self, cursor: Cursor) -> None:
        """Wait for the engines if they find no room alongside the workers."""
        if self._asked is None:
            return
        state = self._line.state() if self._line is not None and dist.get_rank() == 0 else None
        status = Status(from_first(self._status(state), device=self._device)[0])
        if status in (Status.DONE, Status.FAILED):
            self._asked = None
        elif status is Status.NO_ROOM:
            self._wait(cursor)

    def _settle_last(self, cursor: Cursor) -> bool:
        """Wait until the last request has ended; returns False if the training should stop meanwhile."""
        assert self._asked is not None
        self.after_step(cursor)
        if self._asked is None:
            return True
        if self._stopping(cursor):
            return False
        if not self._told_wait:
            self._told_wait = True
            self._emit(
                GenerationNotice(
                    self._asked.step,
                    f"not finished yet, so training waits for them after step {cursor.step}, when the next are due (shown only "
                    "once; if training waits too long, raise generate.every_steps)",
                )
            )
        return self._wait(cursor) is not None

    def _ask(self, step: int, pauses: bool) -> None:
        if pauses and self._device.type == "cuda":
            torch.cuda.empty_cache()  # the engines need the room
        places = self._places() if pauses else ()
        self._asked = GenerationDue(step, time.time_ns(), places)
        if dist.get_rank() == 0 and self._line is not None:
            self._line.ask(self._asked)

    def _pause(self) -> None:
        """Free the devices for the engines of the request that is under way."""
        assert self._asked is not None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._asked = GenerationDue(self._asked.step, self._asked.ticket, self._places())
        if dist.get_rank() == 0 and self._line is not None:
            self._line.ask(self._asked)

    def _places(self) -> tuple[Place, ...]:
        assert self._line is not None
        places: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(places, self._line.place)
        return tuple(places)

    def _wait(self, cursor: Cursor) -> GenerationState | None:
        """Wait for the end of the request; returns None if the training should stop before then."""
        assert self._line is not None
        seen: list[int] = []
        while True:
            if self._phases.phase != "generation":  # a checkpoint may come in between
                self._phases.enter("generation", cursor.step)
            if seen:
                self._let_time_pass()
            state = self._line.state() if dist.get_rank() == 0 else None
            told = (state.predictions, state.signs) if state else (0, 0)
            status, *progress = from_first(self._status(state), *told, device=self._device)
            if status in (Status.DONE, Status.FAILED):
                self._asked = None
                return self._shared(state)
            if self._stopping(cursor):
                return None
            if status == Status.NO_ROOM and self._asked and not self._asked.places:
                self._pause()
            if progress != seen:
                seen = progress
                self._phases.progress()

    def _let_time_pass(self) -> None:
        assert self._line is not None
        if self._device.type == "cuda":
            time.sleep(LOOK_SECONDS)  # all alike: waiting in a collective would keep busy a GPU that engines use
        elif dist.get_rank() == 0:
            self._line.wait(LOOK_SECONDS)

    def _status(self, state: GenerationState | None) -> Status:
        """What the driver said about the request; only the first worker knows."""
        if state is None or self._asked is None or state.ticket != self._asked.ticket:
            return Status.RUNNING
        return state.status

    def _shared(self, value: Any) -> Any:
        """Return the first worker's value on all workers. A collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
