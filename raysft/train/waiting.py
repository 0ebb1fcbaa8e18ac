"""How one worker waits for its rows, and what it hears from outside in the meantime."""

from __future__ import annotations

import time

from raysft.telemetry.events import PreemptionNotice
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.triggers import CheckpointTrigger
from raysft.train.decisions import any_worker
from raysft.train.job import Batch
from raysft.train.phases import Phase
from raysft.train.read_ahead import ReadAhead
from raysft.train.saving import Checkpoints
from raysft.train.training import Training

LOOK_SECONDS = 1.0
"""Time between two checks for a request to stop while a worker waits for its rows."""


class Requests:
    """Does what any worker was asked to do: save a checkpoint, or end the training."""

    def __init__(self, training: Training, trigger: CheckpointTrigger, checkpoints: Checkpoints) -> None:
        self._training, self._trigger, self._checkpoints = training, trigger, checkpoints

    def heard(self, cursor: Cursor, noticed: bool, late: bool, over: bool) -> None:
        """Process what the workers shared in a step or a wait.

        Args:
            cursor: after the step.
            noticed: True if any worker's machine is about to be preempted.
            late: True if the first worker's clock asks for a checkpoint.
            over: True if the first worker was asked to stop.
        """
        if self._trigger.update(cursor.step, noticed, late):
            self._training.emit(PreemptionNotice(cursor.step, self._training.outside.preemption_reason()))
        if over:
            self._training.stop_as_asked()

    def look(self, cursor: Cursor, *more: bool) -> list[bool]:
        """Do together what any worker was asked to do while all wait; returns, for each of ``more``, whether any worker says so."""
        training = self._training
        noticed, late, over, *others = any_worker(*self._trigger.requests(), *more, device=training.device)
        trained = cursor.step > training.first_step  # else there is nothing to save; the first step will hear it
        self.heard(cursor, noticed and trained, late and trained, over)
        if trained and not training.end.reason:
            self._checkpoints.save_if_due(cursor)
        return others

    def hears_the_end(self, cursor: Cursor) -> bool:
        """Check for requests, and return True if the training should end."""
        self.look(cursor)
        return bool(self._training.end.reason)


class StepRows:
    """This worker's rows of each step, for which all workers wait together."""

    def __init__(self, training: Training, ahead: ReadAhead[Batch], requests: Requests) -> None:
        """
        Args:
            training: which the rows are for.
            ahead: reads them.
            requests: checked while any worker waits.
        """
        self._training, self._ahead, self._requests = training, ahead, requests
        self.are_late = False
        """True if any worker did not have the rows of the next step at the end of the last one."""
        self.own_wait = 0.0
        """Seconds that this worker waited for its rows of the current step."""
        self.wait = 0.0
        """Seconds that all workers waited until each had its rows of the current step."""

    @property
    def ready(self) -> bool:
        """True if this worker has its rows of the next step."""
        return self._ahead.ready

    def wait_for_first(self, cursor: Cursor) -> None:
        """Wait for the first step's rows, which is part of the setup."""
        (self.are_late,) = any_worker(not self.ready, device=self._training.device)
        self.wait_for_next(cursor)

    def wait_for_next(self, cursor: Cursor) -> None:
        """Wait until all workers have their rows, or the training should end.

        They may never come: Ray starts no tasks on a node that it drains, and those that read rows may have no other. So while
        any worker waits for its rows, all of them check for requests together. A worker whose rows cannot be read does not wait for
        those of the others.
        """
        self.own_wait, self.wait, late = 0.0, 0.0, self.are_late
        while late and not self._ahead.failed and not self._training.end.reason:
            self._wait_in("step" if self.ready else "data", cursor.step + 1)
            waiting_since = time.perf_counter()
            self._ahead.wait(LOOK_SECONDS)
            self.own_wait += time.perf_counter() - waiting_since
            (late,) = self._requests.look(cursor, not self.ready)
            self.wait += time.perf_counter() - waiting_since

    def take(self) -> Batch | None:
        """Return the rows of the next step; None if none are left. Raises what reading them raised."""
        return self._ahead.take()

    def _wait_in(self, phase: Phase, step: int) -> None:
        """Tell the watchdog whom all are waiting for; a continuing wait is not progress. The first rows belong to the setup."""
        phases = self._training.phases
        if phases.phase != "setup" and (phases.phase != phase or phases.step != step):
            phases.enter(phase, step)
