"""The epochs of one row_plan and then those of another: what a run trains on whose data changes on the way. Pure."""

from __future__ import annotations

import numpy as np

from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.row_plan import RowPlan


def splice(earlier: RowPlan, later: RowPlan, examples: int, sources: int, max_steps: int | None = None) -> RowPlan:
    """All epochs of ``earlier``, then those of ``later`` that come after them.

    Args:
        earlier: whole epochs.
        later: all epochs, from the first one on; with rows and steps of the same size.
        examples: those of ``earlier``, over all its sources; those of ``later`` are numbered after them.
        sources: those of ``earlier``, likewise.
        max_steps: cut the row_plan after so many steps.
    """
    per_step, done = earlier.global_batch_size, len(earlier.epoch_ends)
    assert (per_step, earlier.capacity) == (later.global_batch_size, later.capacity)
    ends = np.concatenate([[0], later.epoch_ends])
    skipped = int((-(-np.diff(ends[: done + 1]) // per_step) * per_step).sum())
    start = -(-earlier.rows // per_step) * per_step
    rest = layouts.cut(later.segments, later.rows, skipped)
    filled = layouts.empty(start - earlier.rows)
    segments = layouts.chain([earlier.segments, filled, rest._replace(examples=rest.examples + examples)])
    numbers = np.concatenate([earlier.sources, later.sources[len(later.sources) - len(rest.examples) :] + sources])
    if max_steps:
        segments = layouts.cut(segments, max_steps * per_step)
    return RowPlan(
        segments=segments,
        sources=numbers[: len(segments.examples)].astype(np.int16),
        weights=_weights(earlier, later, examples),
        capacity=earlier.capacity,
        global_batch_size=per_step,
        group_ends=np.concatenate([earlier.group_ends, later.group_ends[later.group_ends > skipped] - skipped + start]),
        epoch_ends=np.concatenate([earlier.epoch_ends, ends[done + 1 :] - ends[done] + earlier.epoch_ends[-1]]),
    )


def _weights(earlier: RowPlan, later: RowPlan, examples: int) -> np.ndarray | None:
    if earlier.weights is None and later.weights is None:
        return None
    before = np.ones(examples, np.float32) if earlier.weights is None else earlier.weights
    highest = int(later.segments.examples.max()) + 1
    after = np.ones(highest, np.float32) if later.weights is None else later.weights
    return np.concatenate([before, after])
