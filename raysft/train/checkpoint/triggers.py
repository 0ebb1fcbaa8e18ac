"""When to save a checkpoint: after a number of steps, epochs or minutes, before a machine is preempted, and before it stops."""

from __future__ import annotations

from time import monotonic

from raysft.config import TrainSection
from raysft.train.decisions import Outside
from raysft.train.intervals import Interval


class CheckpointTrigger:
    """Decide on all workers alike when to save; what only one worker knows reaches the others with the sums of a step."""

    def __init__(self, train: TrainSection, scheduled: Interval, rank: int, outside: Outside) -> None:
        """
        Args:
            train: how often to save.
            scheduled: after which steps to save in any case.
            rank: this worker's rank; the clock of rank 0 counts, and what it hears about the end.
            outside: asked in each step.
        """
        self._train, self._scheduled, self._first, self._outside = train, scheduled, rank == 0, outside
        self._saved = monotonic()
        self._noticed_after: int | None = None
        """The step after which a preemption became known."""
        self._late_after: int | None = None
        """The step after which the clock of rank 0 asked for a checkpoint."""

    def start_clock(self) -> None:
        """Count the minutes from now on: a checkpoint was written, or the training starts."""
        self._saved = monotonic()

    def stops(self) -> bool:
        """Return True if this worker knows that the training is to stop."""
        return self._first and bool(self._outside.stop_reason())

    def requests(self) -> tuple[bool, bool, bool]:
        """Return what this worker adds to a step's sums: its machine will be preempted; a checkpoint is late; it is to stop."""
        over = self.stops()
        if not self._train.resumes:
            return False, False, over
        minutes = self._train.save_every_minutes
        late = self._first and minutes is not None and monotonic() - self._saved >= 60 * minutes
        return bool(self._outside.preemption_reason()), late, over

    def update(self, step: int, noticed: bool, late: bool) -> bool:
        """Take what any worker requested in a step; return True for the first notice of a preemption."""
        self._late_after = step if late else self._late_after
        if not noticed or self._noticed_after is not None:
            return False
        self._noticed_after = step
        return True

    def is_scheduled(self, step: int) -> bool:
        """Return True if ``save_every_steps`` or ``save_every_epochs`` asks for a checkpoint after a step."""
        return self._scheduled.is_due(step)

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is due after a step, for any reason."""
        return self.is_scheduled(step) or step in (self._noticed_after, self._late_after)
