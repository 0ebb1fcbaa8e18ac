"""Join the epochs of two row plans, for a run whose data changes along the way. Pure functions."""

from __future__ import annotations

import numpy as np

from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.mixture import index_type
from raysft.data.rows.row_layouts import SegmentsBuilder
from raysft.data.rows.row_plan import RowPlan


def splice(earlier: RowPlan, later: RowPlan, examples: int, sources: int, max_steps: int | None = None) -> RowPlan:
    """Return all epochs of ``earlier``, then those of ``later`` with a higher number.

    Args:
        earlier: a plan of whole epochs.
        later: a plan of all epochs, from the first on, with the same sizes of row and step.
        examples: examples in the sources of ``earlier``; those of ``later`` are numbered after them.
        sources: sources of ``earlier``, likewise.
        max_steps: cut the plan after this number of steps.
    """
    per_step, done = earlier.global_batch_size, len(earlier.epoch_ends)
    assert (per_step, earlier.capacity) == (later.global_batch_size, later.capacity)
    ends = np.concatenate([[0], later.epoch_ends])
    skipped = int((-(-np.diff(ends[: done + 1]) // per_step) * per_step).sum())
    start = -(-earlier.rows // per_step) * per_step
    rest = layouts.slice_rows(later.segments, skipped, later.rows)
    kept = earlier.segments.examples
    index = index_type(len(kept) + len(rest.examples) + examples + int(rest.examples.max(initial=0)) + 1)
    builder = SegmentsBuilder(index)
    for part in (earlier.segments, layouts.empty_rows(start - earlier.rows)):
        builder.append(part)
    builder.append(rest._replace(examples=rest.examples.astype(index) + examples))
    segments = builder.build()
    numbers = np.concatenate([earlier.sources, later.sources[len(later.sources) - len(rest.examples) :] + sources])
    if max_steps:
        segments = layouts.slice_rows(segments, 0, max_steps * per_step)
    return RowPlan(
        segments=segments,
        sources=numbers[: len(segments.examples)].astype(np.int16),
        weights=_example_weights(earlier, later, examples),
        capacity=earlier.capacity,
        global_batch_size=per_step,
        group_ends=np.concatenate([earlier.group_ends, later.group_ends[later.group_ends > skipped] - skipped + start]),
        epoch_ends=np.concatenate([earlier.epoch_ends, ends[done + 1 :] - ends[done] + earlier.epoch_ends[-1]]),
    )


def _example_weights(earlier: RowPlan, later: RowPlan, examples: int) -> np.ndarray | None:
    """[examples of both] float32; None if all are 1."""
    if earlier.weights is None and later.weights is None:
        return None
    before = np.ones(examples, np.float32) if earlier.weights is None else earlier.weights
    used = int(later.segments.examples.max()) + 1
    after = np.ones(used, np.float32) if later.weights is None else later.weights
    return np.concatenate([before, after])
