"""Row plan: each epoch holds each example once, and the content of a step is known before it starts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from raysft.data.rows import mixture
from raysft.data.rows.batch_size import auto_batch_size
from raysft.data.rows.row_plan import RowPlan, SourceLengths, plan_rows

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(1, 33, 500).astype(np.int32)
LOSS_TOKENS = (LENGTHS * RANDOM.random(500)).astype(np.int32)
SHARD_ENDS = np.array([100, 130, 350, 400, 500])


def plan(**options) -> RowPlan:
    defaults = {"capacity": 64, "global_batch_size": 8}
    return plan_rows([SourceLengths(LENGTHS, LOSS_TOKENS, SHARD_ENDS)], **{**defaults, **options})


def rows_of(row_plan: RowPlan, first: int = 0, last: int | None = None) -> list[list[int]]:
    return [row_plan.row(index).tolist() for index in range(first, row_plan.rows if last is None else last)]


def flat(rows: list[list[int]]) -> list[int]:
    return [example for row in rows for example in row]


OPTIONS = [
    {},
    {"layout": "single"},
    {"shuffle": False},
    {"layout": "single", "shuffle": False},
    {"global_batch_size": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("group", [1, 120, 10_000])
def test_each_epoch_holds_each_example_once_and_no_row_is_too_full(options, group, monkeypatch):
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", group)
    row_plan = plan(epochs=3, **options)
    filled = [row for row in rows_of(row_plan) if row]
    for start, end in pairwise([0, *row_plan.epoch_ends.tolist()]):
        assert sorted(flat(filled[start:end])) == list(range(500))
    assert row_plan.group_ends[-1] == row_plan.rows
    assert row_plan.epoch_ends[-1] == len(filled)
    assert all(0 < LENGTHS[row].sum() <= 64 for row in rows_of(row_plan) if row)


@pytest.mark.parametrize("options", [*OPTIONS, {"global_batch_size": 1}, {"global_batch_size": 1000}], ids=str)
def test_no_step_holds_rows_of_two_epochs_and_only_the_last_of_each_is_not_full(options):
    row_plan, one = plan(epochs=3, **options), plan(**options)
    per_step = row_plan.global_batch_size
    assert row_plan.steps == 3 * -(-one.rows // per_step)
    assert row_plan.rows_of_epochs == [one.rows] * 3
    in_epoch = row_plan.steps // 3
    for epoch in range(3):
        steps = slice(epoch * in_epoch, (epoch + 1) * in_epoch)
        full, last = divmod(one.rows, per_step)
        assert row_plan.step_rows[steps].tolist() == [per_step] * full + [last] * (last > 0)
        first = epoch * in_epoch * per_step
        assert sorted(flat(rows_of(row_plan, first, min(first + in_epoch * per_step, row_plan.rows)))) == [*range(500)]
        assert row_plan.epoch_of(row_plan.consumed((epoch + 1) * in_epoch)) == epoch + 1.0


def test_the_first_epoch_is_the_same_however_many_follow():
    assert rows_of(plan(epochs=3))[: plan().rows] == rows_of(plan())


def test_the_same_arguments_give_the_same_rows():
    assert rows_of(plan(seed=3, epochs=2)) == rows_of(plan(seed=3, epochs=2))


def test_another_seed_or_epoch_gives_another_order():
    row_plan = plan(seed=3, epochs=2)
    middle = int(row_plan.epoch_ends[0])
    first, second = rows_of(row_plan, 0, middle), rows_of(row_plan, middle)
    assert first != second
    assert first != rows_of(plan(seed=4))
    assert first == rows_of(plan(seed=3))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_totals_of_steps_are_those_of_their_rows(options):
    row_plan = plan(epochs=2, **options)
    per_step = row_plan.global_batch_size
    assert (
        row_plan.steps == -(-row_plan.rows // per_step) == len(row_plan.step_tokens) == len(row_plan.step_loss_tokens)
    )
    for step in range(row_plan.steps):
        examples = flat(rows_of(row_plan, step * per_step, min((step + 1) * per_step, row_plan.rows)))
        assert row_plan.step_tokens[step] == LENGTHS[examples].sum()
        assert row_plan.step_loss_tokens[step] == LOSS_TOKENS[examples].sum()
    assert row_plan.step_tokens.sum() == 2 * LENGTHS.sum()
    filled = sum(1 for row in rows_of(row_plan) if row)
    assert row_plan.step_rows.sum() == filled
    assert row_plan.packing_efficiency == pytest.approx(2 * LENGTHS.sum() / (filled * 64))


@pytest.mark.parametrize("options", [{}, {"layout": "joined"}, {"layout": "joined", "capacity": 20}], ids=str)
def test_the_examples_of_some_steps_are_those_that_begin_in_them(options, monkeypatch):
    monkeypatch.setattr("raysft.data.rows.row_plan.BLOCK", 7)
    row_plan = plan(epochs=3, **options)
    for steps in (0, 1, row_plan.steps // 2, row_plan.steps):
        # An example in two rows stands at the end of the one and at the beginning of the next.
        met = [example for row in rows_of(row_plan, 0, min(8 * steps, row_plan.rows)) for example in row]
        assert row_plan.examples_after(steps) == sum(one != other for one, other in pairwise([None, *met]))
    assert row_plan.examples == 3 * 500


@pytest.mark.parametrize("max_steps", [1, 3, 20])
def test_max_steps_is_the_beginning_of_the_whole_plan(max_steps):
    whole, cut = plan(epochs=3, seed=1), plan(epochs=3, seed=1, max_steps=max_steps)
    assert cut.steps == max_steps
    assert cut.rows == max_steps * 8
    assert rows_of(cut) == rows_of(whole)[: cut.rows]


def test_max_steps_beyond_the_epochs_changes_nothing():
    assert rows_of(plan(max_steps=10_000)) == rows_of(plan())


def test_without_packing_each_row_holds_one_example():
    assert plan(layout="single").rows == 500
    assert {len(row) for row in rows_of(plan(layout="single"))} == {1}


def test_without_shuffling_the_order_is_that_of_the_data():
    assert flat(rows_of(plan(shuffle=False, layout="single"))) == list(range(500))
    firsts = [min(row) for row in rows_of(plan(shuffle=False))]
    assert firsts == sorted(firsts)


def test_packing_leaves_little_padding():
    assert plan().packing_efficiency > 0.98
    assert plan(layout="single").packing_efficiency == pytest.approx(LENGTHS.sum() / (500 * 64))


@pytest.mark.parametrize(("group", "sizes"), [(100, [100] * 5), (120, [125] * 4), (300, [500])])
def test_groups_hold_at_least_the_given_number_of_examples(group, sizes, monkeypatch):
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", group)
    row_plan = plan(shuffle=False, layout="single")
    assert np.diff([0, *row_plan.group_ends]).tolist() == sizes


def test_a_row_never_mixes_groups_and_a_shard_is_in_few_of_them(monkeypatch):
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", 120)
    row_plan = plan()
    ends = [0, *row_plan.group_ends.tolist()]
    groups = [set(flat(rows_of(row_plan, start, end))) for start, end in pairwise(ends)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 500
    shards = [{int(np.searchsorted(SHARD_ENDS, example, side="right")) for example in group} for group in groups]
    # Borders of groups cut through at most one shard each.
    assert sum(map(len, shards)) <= len(SHARD_ENDS) + len(groups) - 1


def test_consumed_rows_are_converted_to_epochs():
    row_plan = plan(epochs=2, layout="single")
    consumed = [0, 125, 500, 501, 750, 1000]
    assert [row_plan.epoch_of(rows) for rows in consumed] == [0.0, 0.25, 1.0, 1.002, 1.5, 2.0]
    # 500 rows in steps of 8: the 63rd step ends the first epoch.
    assert [row_plan.consumed(steps) for steps in (0, 62, 63, 64, 126)] == [0, 496, 500, 508, 1000]
    assert type(row_plan.epoch_of(125)) is float


def test_a_cut_epoch_counts_in_proportion():
    assert plan(epochs=2, layout="single", max_steps=10).epoch_of(80) == 0.16


@pytest.mark.parametrize("max_steps", [None, 1, 7])
@pytest.mark.parametrize("epochs", [1, 2, 7, 40])
@pytest.mark.parametrize("examples", [1, 3, 40, 500, 4000])
def test_an_automatic_batch_size_follows_from_the_data(examples, epochs, max_steps):
    given = [SourceLengths(np.full(examples, 20), np.full(examples, 9), np.array([examples]))]
    whole = plan_rows(given, capacity=64, epochs=epochs, layout="single")
    cut = plan_rows(given, capacity=64, epochs=epochs, layout="single", max_steps=max_steps)
    chosen = whole.global_batch_size
    assert cut.global_batch_size == chosen, "max_steps decides nothing"
    assert chosen in (1, 2, 4, 8, 16, 32)
    enough = examples * epochs >= 100
    assert (whole.steps >= 100) == enough
    assert chosen == 1 or enough
    twice = plan_rows(given, capacity=64, epochs=epochs, layout="single", global_batch_size=2 * chosen)
    # No larger one would do: it makes too few steps, is more than an epoch has, or more than 32.
    assert chosen == 32 or -(-examples * epochs // (2 * chosen)) < 100 or chosen >= examples or twice.steps < 100


def test_an_automatic_batch_size_reads_no_more_epochs_than_it_needs():
    seen = []
    assert auto_batch_size(seen.append(epoch) or np.ones(5) for epoch in range(100_000)) == 8
    assert len(seen) < 1000


def test_an_automatic_batch_size_gives_every_step_loss_tokens():
    loss_tokens = np.where(np.arange(120) % 3 == 0, 5, 0)
    given = [SourceLengths(np.full(120, 20), loss_tokens, np.array([120]))]
    row_plan = plan_rows(given, capacity=20, layout="single", shuffle=False)
    assert row_plan.global_batch_size == 4
    assert row_plan.step_loss_tokens.all()


def sources(*sizes: int, weights: tuple[float, ...] = ()) -> list[SourceLengths]:
    random = np.random.default_rng(1)
    made = []
    for size, weight in zip(sizes, weights or (1.0,) * len(sizes), strict=True):
        lengths = random.integers(2, 33, size)
        ends = np.unique([*range(100, size, 100), size])
        made.append(SourceLengths(lengths, lengths - 1, ends, weight))
    return made


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    ("mixing", "takes"), [("concat", [300, 900]), ("first_exhausted", [300, 100]), ("all_exhausted", [2700, 900])]
)
def test_every_epoch_of_a_mixture_takes_from_each_source_in_proportion_to_its_weight(mixing, takes, epochs):
    given = sources(300, 900, weights=(3.0, 1.0))
    row_plan = plan_rows(given, capacity=64, global_batch_size=8, mixing=mixing, epochs=epochs)
    filled = [row for row in rows_of(row_plan) if row]
    for start, end in pairwise([0, *row_plan.epoch_ends.tolist()]):
        examples = np.array(flat(filled[start:end]))
        counts = [
            np.bincount(examples[examples < 300], minlength=300),
            np.bincount(examples[examples >= 300] - 300, minlength=900),
        ]
        assert [count.sum() for count in counts] == takes
        # No example comes again before all have come.
        assert all(count.max() - count.min() <= 1 for count in counts)


def test_a_mixture_is_drawn_anew_in_each_epoch():
    row_plan = plan_rows(sources(300, 900), capacity=64, global_batch_size=8, mixing="first_exhausted", epochs=2)
    middle = int(row_plan.epoch_ends[0])
    first, second = (
        {example for example in flat(rows) if example >= 300}
        for rows in (rows_of(row_plan, 0, middle), rows_of(row_plan, middle))
    )
    assert first != second


def test_each_group_has_its_part_of_every_source(monkeypatch):
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", 200)
    row_plan = plan_rows(sources(300, 900), capacity=64, global_batch_size=8)
    assert len(row_plan.group_ends) == 6
    for start, end in pairwise([0, *row_plan.group_ends.tolist()]):
        examples = np.array(flat(rows_of(row_plan, start, end)))
        assert [(examples < 300).sum(), (examples >= 300).sum()] == [50, 150]


def test_weights_of_a_step_and_of_its_sources_are_known_in_advance():
    given = sources(300, 900)
    random = np.random.default_rng(2)
    weighted = [replace(given[0], example_weights=random.random(300).astype(np.float32)), given[1]]
    row_plan = plan_rows(weighted, capacity=64, global_batch_size=8)
    of_examples = np.concatenate([weighted[0].example_weights, np.ones(900)])
    loss_tokens = np.concatenate([each.loss_tokens for each in given])
    for step in range(row_plan.steps):
        examples = np.array(flat(rows_of(row_plan, step * 8, min(step * 8 + 8, row_plan.rows))))
        expected = of_examples[examples] * loss_tokens[examples]
        assert row_plan.step_weight[step] == pytest.approx(expected.sum())
        both = [expected[examples < 300].sum(), expected[examples >= 300].sum()]
        assert row_plan.source_weight(step, 2).tolist() == pytest.approx(both)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("capacity", [8, 31, 64, 5000])
@pytest.mark.parametrize("shuffle", [True, False])
def test_joined_documents_fill_every_row_and_lose_nothing(capacity, shuffle, document_mask):
    given = sources(40)
    row_plan = plan_rows(
        given, capacity=capacity, global_batch_size=1, layout="joined", document_mask=document_mask, shuffle=shuffle
    )
    assert (row_plan.step_tokens[:-1] == capacity).all()
    segments = row_plan.segments
    predicted = {example: [] for example in range(40)}
    for row in range(row_plan.rows):
        for segment in range(segments.offsets[row], segments.offsets[row + 1]):
            first = segments.starts[segment] + (1 if document_mask or segment == segments.offsets[row] else 0)
            predicted[int(segments.examples[segment])] += range(first, segments.stops[segment])
    total = sum(len(tokens) for tokens in predicted.values())
    assert total == row_plan.step_loss_tokens.sum()
    if document_mask:  # each token but a document's first, once
        assert all(tokens == list(range(1, given[0].lengths[example])) for example, tokens in predicted.items())
    else:  # each token but the very first, once
        assert total == given[0].lengths.sum() - 1
        assert all(len(set(tokens)) == len(tokens) for tokens in predicted.values())


@pytest.mark.parametrize("mean", [591, 2085])
def test_log_normal_lengths_leave_less_than_half_a_percent_of_padding(mean):
    lengths = np.exp(np.random.default_rng(0).normal(np.log(mean) - 0.5, 1.0, 100_000)).astype(int).clip(1, 4096)
    ends = np.arange(10_000, 100_001, 10_000)
    row_plan = plan_rows([SourceLengths(lengths, lengths - 1, ends)], capacity=4096, global_batch_size=32)
    assert row_plan.packing_efficiency >= 0.995


def test_a_part_of_a_source_is_a_sample_of_all_its_shards():
    ends = np.arange(1, 21) * 5000
    chosen = mixture.order(ends, 1000, np.random.default_rng(0))
    assert len(np.unique(chosen)) == 1000
    per_shard = np.bincount(chosen // 5000, minlength=20)
    assert per_shard.min() > 20
    assert per_shard.max() < 90
    assert (np.bincount(mixture.order(ends, 150_000, np.random.default_rng(0))) >= 1).all()
