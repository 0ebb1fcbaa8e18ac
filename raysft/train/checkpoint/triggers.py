"""When a checkpoint is due: every so many steps, every so many minutes, and when a machine is about to be taken away."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from raysft.config import TrainSection

Notice = Callable[[], str]
"""What is known of this worker's machine being taken away soon; empty while it is not."""


class Due:
    """Decides for all workers alike: what only one of them knows reaches the others with the sums of a step."""

    def __init__(self, train: TrainSection, rank: int, notice: Notice) -> None:
        """
        Args:
            train: says how often.
            rank: of this worker; the first one's clock counts.
            notice: asked in each step.
        """
        self._train, self._first, self.notice = train, rank == 0, notice
        self._saved = monotonic()
        self._noticed_after: int | None = None
        """The step after which it was known that machines are about to be taken away."""
        self._late_after: int | None = None
        """The step after which the first worker's clock asked for a checkpoint."""

    def start_clock(self) -> None:
        """Count the minutes from now on: a checkpoint was written, or the training begins."""
        self._saved = monotonic()

    def asks(self) -> tuple[bool, bool]:
        """What this worker adds to a step's sums: that its machine is about to be taken away, and that time is up."""
        if not self._train.resumes:
            return False, False
        minutes = self._train.save_every_minutes
        late = self._first and minutes is not None and monotonic() - self._saved >= 60 * minutes
        return bool(self.notice()), late

    def hear(self, step: int, noticed: bool, late: bool) -> bool:
        """Take what any worker asked for in a step; gives whether it is the first that is heard of a machine leaving."""
        self._late_after = step if late else self._late_after
        if not noticed or self._noticed_after is not None:
            return False
        self._noticed_after = step
        return True

    def by_steps(self, step: int) -> bool:
        """Whether ``save_every_steps`` asks for a checkpoint after a step."""
        every = self._train.save_every_steps
        return every is not None and step % every == 0

    def after(self, step: int) -> bool:
        """Whether a checkpoint is due after a step."""
        return self.by_steps(step) or step in (self._noticed_after, self._late_after)
