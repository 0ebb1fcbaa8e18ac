"""What happens every few steps or epochs of training: evaluations and checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from raysft.config import TrainSection

TOLERANCE = 1e-9
"""Tolerance for a number of epochs, computed from steps: 3 / 10 is a little less than 3 · 0.1."""


class Steps(Protocol):
    """The steps of a training run, and the epochs that they belong to (``data.rows.row_plan.RowPlan``)."""

    @property
    def steps(self) -> int: ...

    def epochs_after(self, steps: int) -> float: ...


@dataclass(frozen=True)
class Interval:
    """Says after which steps something is due; if both keys are set, both count."""

    row_plan: Steps
    steps: int | None
    epochs: float | None
    delay: float = 0.0
    """Number of steps, for ``steps``, and of epochs, for ``epochs``, before which it is never due."""

    @classmethod
    def of_evaluations(cls, train: TrainSection, row_plan: Steps) -> Interval:
        """Evaluations during training; those before its first step and at its end always happen."""
        return cls(row_plan, train.eval_every_steps, train.eval_every_epochs, train.eval_delay)

    @classmethod
    def of_checkpoints(cls, train: TrainSection, row_plan: Steps) -> Interval:
        """Checkpoints that stay when the run is done."""
        return cls(row_plan, train.save_every_steps, train.save_every_epochs)

    def is_due(self, step: int) -> bool:
        """Return True if it is due after a step. For an epoch, that is its last step; for a fraction, it is rounded up."""
        if self.steps is not None and step % self.steps == 0 and step >= self.delay:
            return True
        if self.epochs is None:
            return False
        before, now = self.row_plan.epochs_after(step - 1), self.row_plan.epochs_after(step)
        return self._count(now) > self._count(before) and now + TOLERANCE >= self.delay

    def _count(self, epochs: float) -> int:
        """How often it was due in this many epochs, ignoring the delay."""
        assert self.epochs is not None
        return math.floor(epochs / self.epochs + TOLERANCE)

    def first(self) -> int:
        """Return the first step after which it is due; the last step if it never is."""
        return next(filter(self.is_due, range(1, self.row_plan.steps)), self.row_plan.steps)
