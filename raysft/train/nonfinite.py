"""Steps whose loss or gradient is infinite or no number: they change nothing, and are told of by their records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from raysft.errors import RunFailed
from raysft.train.step import StepResult

IN_A_ROW = 20
"""Steps after which a run that leaves out what is not finite has nothing more to learn."""
NAMED_RECORDS = 8


class NonFinite:
    """Counts such steps, and ends the run where ``train.nonfinite`` says so."""

    def __init__(self, job: Any) -> None:
        self.config, self.rows = job.config, job.train_rows
        self.count, self.last = 0, -2

    def check(self, index: int, trained: StepResult) -> str:
        """Look at a step that was not applied.

        Returns:
            What happened, for people; empty where it is only loss scaling, which tries higher scales on purpose.

        Raises:
            RunFailed: the run is to stop at such a step, or there were too many in a row.
        """
        self.count = self.count + 1 if index == self.last + 1 else 1
        self.last = index
        scaling = self.config.dtype == "float16" and math.isfinite(trained.loss)
        skips = scaling or self.config.train.nonfinite == "skip"
        row_plan = self.rows.row_plan
        first = index * row_plan.global_batch_size
        last = min(first + row_plan.global_batch_size, row_plan.rows) - 1
        what = (
            f"the loss is {trained.loss} and the gradient norm {trained.norm} "
            f"(rows {first} to {last}: {named_records(self.rows, range(first, last + 1))})"
        )
        if not skips:
            raise RunFailed(
                f"step {index + 1}: {what}; look at these records, lower train.learning_rate, or set train.nonfinite=skip"
            )
        if self.count >= IN_A_ROW:
            raise RunFailed(
                f"step {index + 1}: {self.count} steps in a row could not be applied; in the last one {what}; "
                "look at these records, or lower train.learning_rate"
            )
        return "" if scaling else what


def named_records(source: Any, rows: Iterable[int]) -> str:
    """The first records that some rows come from."""
    names = list(dict.fromkeys(name for row in rows for name in source.records(row)))
    more = f" and {len(names) - NAMED_RECORDS} more" if len(names) > NAMED_RECORDS else ""
    return ", ".join(names[:NAMED_RECORDS]) + more
