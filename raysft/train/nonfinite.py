"""Steps whose loss or gradient is NaN or infinite: they change no weights, and their records are named."""

from __future__ import annotations

import math
from typing import Any

from raysft.errors import RunFailed
from raysft.models.kt_experts import LEAST_GATE
from raysft.train.step import StepResult
from raysft.train.step_rows import named_records

MAX_IN_A_ROW = 20
"""Consecutive skipped steps after which a run that skips them stops: it no longer learns anything."""


class NonFinite:
    """Counts steps that were not applied, and stops the run as ``train.nonfinite`` asks."""

    def __init__(self, job: Any) -> None:
        self.config, self.rows = job.config, job.train_rows
        self.count, self.last = 0, -2

    def check(self, index: int, result: StepResult) -> str:
        """Check a step that was not applied.

        Returns:
            The reason, for people; empty if only float16 loss scaling caused it, which tries higher scales on purpose.

        Raises:
            RunFailed: ``train.nonfinite=stop``, or too many steps in a row were skipped.
        """
        self.count = self.count + 1 if index == self.last + 1 else 1
        self.last = index
        scaling = self.config.dtype == "float16" and math.isfinite(result.loss)
        skip = scaling or self.config.train.nonfinite == "skip"
        row_plan = self.rows.row_plan
        first = index * row_plan.global_batch_size
        last = min(first + row_plan.global_batch_size, row_plan.rows) - 1
        reason = (
            f"the loss is {result.loss} and the gradient norm is {result.norm} "
            f"(rows {first} to {last}: {named_records(self.rows, range(first, last + 1))})"
        )
        if not skip:
            raise RunFailed(
                f"step {index + 1}: {reason}; check these records, lower train.learning_rate, or set train.nonfinite=skip"
                + self._other_cause
            )
        if self.count >= MAX_IN_A_ROW:
            raise RunFailed(
                f"step {index + 1}: {self.count} steps in a row were skipped; in the last one {reason}; "
                f"check these records, or lower train.learning_rate{self._other_cause}"
            )
        return "" if scaling else reason

    @property
    def _other_cause(self) -> str:
        if self.config.model.experts != "kt":
            return ""
        return (
            "; or set model.experts=auto: KTransformers' kernel has no gradient for a token whose gate in one of its experts is "
            f"below {LEAST_GATE}"
        )
