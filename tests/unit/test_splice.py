"""Spliced plans: each epoch holds each of its examples once, and the earlier epochs stay as they were."""

from __future__ import annotations

import numpy as np
import pytest

from raysft.data.rows.row_plan import RowPlan, SourceLengths, plan_rows
from raysft.data.rows.splice import splice

RANDOM = np.random.default_rng(1)


def source(count: int, weights: bool = False) -> SourceLengths:
    lengths = RANDOM.integers(1, 30, count).astype(np.int32)
    own = RANDOM.random(count).astype(np.float32) if weights else None
    return SourceLengths(lengths, lengths, np.array([count // 2, count]), 1.0, own)


FIRST, OTHER, MORE = source(110), source(60), source(75, weights=True)


def plan(*sources: SourceLengths, **options) -> RowPlan:
    return plan_rows(list(sources), **{"capacity": 32, "global_batch_size": 8, "seed": 3, **options})


def steps_of(row_plan: RowPlan, first: int, last: int) -> list[list[int]]:
    rows = range(first * 8, min(last * 8, row_plan.rows))
    return [row_plan.row(index).tolist() for index in rows]


@pytest.mark.parametrize("layout", ["packed", "single"])
def test_earlier_epochs_stay_and_later_ones_come_from_the_other_plan(layout):
    before, after = plan(FIRST, epochs=2, layout=layout), plan(OTHER, MORE, epochs=4, layout=layout)
    whole = splice(before, after, examples=110, sources=1)
    kept, rest = before.steps, plan(OTHER, MORE, epochs=2, layout=layout).steps
    assert whole.steps == kept + after.steps - rest
    assert steps_of(whole, 0, kept)[: before.rows] == steps_of(before, 0, kept)
    theirs = [[example + 110 for example in row] for row in steps_of(after, rest, after.steps)]
    assert steps_of(whole, kept, whole.steps) == theirs
    for name in ("step_rows", "step_tokens", "step_loss_tokens", "step_weight"):
        joined = np.concatenate([getattr(before, name), getattr(after, name)[rest:]])
        np.testing.assert_allclose(getattr(whole, name), joined, err_msg=name)
    assert whole.source_weight(whole.steps - 1, 3)[0] == 0
    assert whole.source_weight(kept - 1, 3)[1:].sum() == 0


def test_each_epoch_holds_each_of_its_examples_once_even_after_two_changes():
    once = splice(plan(FIRST, epochs=1), plan(OTHER, epochs=2), 110, 1)
    whole = splice(once, plan(MORE, epochs=5), 110 + 60, 2)
    filled = [row for row in steps_of(whole, 0, whole.steps) if row]
    expected = [range(110), range(110, 170)] + 3 * [range(170, 245)]
    starts = [0, *whole.epoch_ends.tolist()]
    assert len(starts) == 6
    assert len(filled) == starts[-1]
    for start, end, examples in zip(starts, starts[1:], expected, strict=False):
        assert sorted(example for row in filled[start:end] for example in row) == list(examples)
    assert whole.epoch_of(starts[2]) == 2
    assert whole.group_ends[-1] == whole.rows


def test_max_steps_counts_the_steps_of_both_plans():
    whole = splice(plan(FIRST, epochs=1), plan(OTHER, epochs=9), 110, 1)
    cut = splice(plan(FIRST, epochs=1), plan(OTHER, epochs=9), 110, 1, max_steps=20)
    assert cut.steps == 20
    assert steps_of(cut, 0, 20) == steps_of(whole, 0, 20)
    assert len(cut.sources) == len(cut.segments.examples)
