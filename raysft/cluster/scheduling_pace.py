"""Keeps Ray Data's scheduling loop from taking a core while it has nothing to schedule."""

from __future__ import annotations

import time
from typing import Any

from raysft.cluster.ray_internals import scheduled

SHORTEST, LONGEST = 0.005, 0.05
"""Seconds."""


def pace(context: Any) -> None:
    """Pace the scheduling loops of all pipelines that are made with a ``DataContext``."""
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, SchedulingPace]


class SchedulingPace:
    """A callback of Ray Data's executions that paces their scheduling loop.

    The loop waits until each of its tasks has a block ready. If enough blocks lie ahead of the training, all have one that is not
    taken yet, and the loop would turn without a wait: most of a core for as long as the training lasts.
    """

    def __init__(self) -> None:
        self.scheduled: tuple[int, ...] = ()
        self.pause = 0.0

    def on_execution_step(self, executor: Any) -> None:
        """Pause if the step did nothing, for longer each time."""
        before, self.scheduled = self.scheduled, scheduled(executor)
        self.pause = min(max(SHORTEST, 2 * self.pause), LONGEST) if self.scheduled == before else 0.0
        time.sleep(self.pause)

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""
