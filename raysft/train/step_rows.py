"""The rows that a worker trains on in a step: compared with the row plan, and named in messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from raysft.data.types import IGNORE_INDEX
from raysft.train.job import Batch
from raysft.train.phases import TRAINING, Phases

NAMED_RECORDS = 8
"""Most records that a message names."""


def cut(batch: Batch, rows: int) -> Iterator[Batch]:
    """Cut rows into microbatches, without the padding that all rows of a microbatch share at their end."""
    for start in range(0, len(batch["row"]), rows):
        part = {name: values[start : start + rows] for name, values in batch.items()}
        width = max(8, -(-int(part["tokens"].max()) // 8) * 8)
        yield {name: values[:, :width] if values.ndim == 2 else values for name, values in part.items()}


def with_targets(part: Batch) -> Batch:
    """Move labels to the tokens that predict them, as ``targets``, along with the weights and sources of their losses.

    Rows may be cut anywhere after that.
    """
    moved = {"labels": ("targets", IGNORE_INDEX), "weights": ("weights", 0), "sources": ("sources", 0)}
    targets = {
        to: np.pad(part[name][:, 1:], ((0, 0), (0, 1)), constant_values=empty)
        for name, (to, empty) in moved.items()
        if name in part
    }
    return {**{name: values for name, values in part.items() if name not in moved}, **targets}


def checked(batch: Batch | None, source: Any, index: int, rank: int, group: int, groups: int) -> Batch:
    """Return the batch if it holds the rows that the row plan has for this worker and step.

    Args:
        batch: what was read.
        source: of the rows.
        index: of the step, from 0.
        rank: of the worker.
        group: of workers that have the same rows; without ``scaling.sequence_parallel`` the worker's rank.
        groups: their number.

    Raises:
        RuntimeError: it holds others. This may concern only one worker, and a restart from the checkpoint may fix it.
    """
    expected = source.rows_for_rank(index, group, groups)
    if batch is None or not np.array_equal(batch["row"], expected):
        received = "no rows" if batch is None else f"rows {batch['row'].tolist()}"
        raise RuntimeError(f"step {index + 1}: worker {rank} needs rows {expected.tolist()}, but received {received}")
    return batch


def current(source: Any, phases: Phases, group: int, groups: int) -> str:
    """Name a worker's rows in the current step, and their records; empty outside a step, or if it has none."""
    if phases.phase not in TRAINING:
        return ""
    rows = [row for row in source.rows_for_rank(phases.step - 1, group, groups).tolist() if row >= 0]
    return f"its rows {', '.join(map(str, rows))} hold {named_records(source, rows)}" if rows else ""


def named_records(source: Any, rows: Iterable[int]) -> str:
    """Name the first records of some rows."""
    names = list(dict.fromkeys(name for row in rows for name in source.records(row)))
    more = f" and {len(names) - NAMED_RECORDS} more" if len(names) > NAMED_RECORDS else ""
    return ", ".join(names[:NAMED_RECORDS]) + more
