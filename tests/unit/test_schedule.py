"""Schedule: each epoch holds each example once, and what a step holds is known before it starts."""

from __future__ import annotations

import numpy as np
import pytest

from raysft.data import schedule as module
from raysft.data.schedule import Schedule, plan_rows

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(1, 33, 500).astype(np.int32)
TRAINED = (LENGTHS * RANDOM.random(500)).astype(np.int32)
SHARD_ENDS = np.array([100, 130, 350, 400, 500])


def planned(**options) -> Schedule:
    defaults = {"capacity": 64, "rows_per_step": 8}
    return plan_rows(LENGTHS, TRAINED, SHARD_ENDS, **{**defaults, **options})


def rows_of(schedule: Schedule, first: int = 0, last: int | None = None) -> list[list[int]]:
    return [schedule.row(index).tolist() for index in range(first, schedule.rows if last is None else last)]


def flat(rows: list[list[int]]) -> list[int]:
    return [example for row in rows for example in row]


OPTIONS = [{}, {"packing": False}, {"shuffle": False}, {"packing": False, "shuffle": False}, {"rows_per_step": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("group", [1, 120, 10_000])
def test_each_epoch_holds_each_example_once_and_no_row_is_too_full(options, group, monkeypatch):
    monkeypatch.setattr(module, "GROUP_EXAMPLES", group)
    schedule = planned(epochs=3, **options)
    starts = [0, *schedule.epoch_ends[:-1].tolist()]
    for start, end in zip(starts, schedule.epoch_ends.tolist(), strict=True):
        assert sorted(flat(rows_of(schedule, start, end))) == list(range(500))
    assert schedule.epoch_ends[-1] == schedule.group_ends[-1] == schedule.rows
    assert all(0 < LENGTHS[row].sum() <= 64 for row in rows_of(schedule))


def test_the_same_arguments_give_the_same_rows():
    assert rows_of(planned(seed=3, epochs=2)) == rows_of(planned(seed=3, epochs=2))


def test_other_seeds_and_other_epochs_give_other_orders():
    schedule = planned(seed=3, epochs=2)
    middle = int(schedule.epoch_ends[0])
    first, second = rows_of(schedule, 0, middle), rows_of(schedule, middle)
    assert first != second
    assert first != rows_of(planned(seed=4))
    assert first == rows_of(planned(seed=3))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_add_up_to_all_tokens_and_each_to_its_rows(options):
    schedule = planned(epochs=2, **options)
    per_step = schedule.rows_per_step
    assert schedule.steps == -(-schedule.rows // per_step) == len(schedule.step_tokens) == len(schedule.step_trained)
    for step in range(schedule.steps):
        examples = flat(rows_of(schedule, step * per_step, min((step + 1) * per_step, schedule.rows)))
        assert schedule.step_tokens[step] == LENGTHS[examples].sum()
        assert schedule.step_trained[step] == TRAINED[examples].sum()
    assert schedule.step_tokens.sum() == 2 * LENGTHS.sum()
    assert schedule.useful == pytest.approx(2 * LENGTHS.sum() / (schedule.rows * 64))


@pytest.mark.parametrize("max_steps", [1, 3, 20])
def test_max_steps_is_the_beginning_of_the_whole_schedule(max_steps):
    whole, cut = planned(epochs=3, seed=1), planned(epochs=3, seed=1, max_steps=max_steps)
    assert cut.steps == max_steps
    assert cut.rows == max_steps * 8
    assert rows_of(cut) == rows_of(whole)[: cut.rows]


def test_max_steps_beyond_the_epochs_changes_nothing():
    assert rows_of(planned(max_steps=10_000)) == rows_of(planned())


def test_without_packing_each_row_holds_one_example():
    assert planned(packing=False).rows == 500
    assert {len(row) for row in rows_of(planned(packing=False))} == {1}


def test_without_shuffling_the_order_is_that_of_the_data():
    assert flat(rows_of(planned(shuffle=False, packing=False))) == list(range(500))
    firsts = [min(row) for row in rows_of(planned(shuffle=False))]
    assert firsts == sorted(firsts)


def test_packing_leaves_little_room_empty():
    assert planned().useful > 0.98
    assert planned(packing=False).useful == pytest.approx(LENGTHS.sum() / (500 * 64))


@pytest.mark.parametrize(("group", "sizes"), [(1, [100, 30, 220, 50, 100]), (120, [130, 220, 150]), (300, [500])])
def test_shards_are_gathered_until_a_group_is_large_enough(group, sizes, monkeypatch):
    monkeypatch.setattr(module, "GROUP_EXAMPLES", group)
    schedule = planned(shuffle=False, packing=False)
    assert np.diff([0, *schedule.group_ends]).tolist() == sizes


def test_a_row_never_mixes_groups(monkeypatch):
    monkeypatch.setattr(module, "GROUP_EXAMPLES", 120)
    schedule = planned()
    groups = [
        set(flat(rows_of(schedule, start, end)))
        for start, end in zip([0, *schedule.group_ends[:-1]], schedule.group_ends, strict=True)
    ]
    shards = [{int(np.searchsorted(SHARD_ENDS, example, side="right")) for example in group} for group in groups]
    assert sum(len(each) for each in shards) == len(set().union(*shards)) == len(SHARD_ENDS)


def test_consumed_rows_are_a_share_of_the_epochs():
    schedule = planned(epochs=2, packing=False)
    consumed = [0, 125, 500, 501, 750, 1000]
    assert [schedule.epoch_of(rows) for rows in consumed] == [0.0, 0.25, 1.0, 1.002, 1.5, 2.0]
    assert type(schedule.epoch_of(125)) is float


def test_a_cut_epoch_counts_as_the_part_that_is_consumed():
    assert planned(epochs=2, packing=False, max_steps=10).epoch_of(80) == 0.16
