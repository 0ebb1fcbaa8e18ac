"""What a worker is doing, and since when: the phases of its training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Phase = Literal[
    "setup", "data", "forward", "backward", "step", "evaluation", "generation", "decision", "checkpoint", "export",
]  # fmt: skip
"""``data``: waiting for rows; ``step``: the optimizer's step and the sums over all workers; ``generation``: for predictions;
``decision``: waiting for a scheduler of trials."""
TRAINING: frozenset[Phase] = frozenset({"forward", "backward", "step"})
"""Phases that are parts of a step."""
MOMENTS: dict[Phase, str] = {
    "setup": "the setup",
    "data": "reading the rows of step {step}",
    **dict.fromkeys(TRAINING, "step {step}"),
    "evaluation": "the evaluation after step {step}",
    "generation": "the generation after step {step}",
    "decision": "the decision after step {step}",
    "checkpoint": "the checkpoint after step {step}",
    "export": "writing the model",
}


@dataclass(frozen=True)
class StepTimes:
    """Where one worker's last step spent its time, in seconds."""

    step: float
    """The whole step, without the wait for its rows."""
    data_wait: float
    """Waiting for its rows before that."""
    forward: float
    """Its forward passes."""


class Phases:
    """The current phase of one worker, which other threads may read; entering one costs less than a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.phase: Phase = "setup"
        self.step = 0
        """Step that the phase belongs to, from 1; 0 before the first."""
        self.progressed = clock()
        """When the worker last showed progress."""
        self.longest_step = 0.0
        """Seconds of the longest recent step."""
        self.last_step: StepTimes | None = None
        """None before the first step."""

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """End the current phase, and begin another, in the same step or another one."""
        self.step = self.step if step is None else step
        self.phase, self.progressed = phase, self._clock()

    @property
    def moment(self) -> str:
        """Phase and step, for messages.

        >>> phases = Phases()
        >>> phases.enter("data", 4)
        >>> phases.moment
        'reading the rows of step 4'
        """
        return MOMENTS[self.phase].format(step=self.step)

    def progress(self) -> None:
        """Note that the phase continues, such as with the next batch of an evaluation."""
        self.progressed = self._clock()

    def step_took(self, times: StepTimes) -> None:
        """Note how long a step took; long ones are forgotten over time, as the first is often longer than the others."""
        self.last_step = times
        self.longest_step = max(times.step, 0.9 * self.longest_step)

    def idle(self) -> float:
        """Seconds without progress."""
        return self._clock() - self.progressed
