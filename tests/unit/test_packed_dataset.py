"""Packed rows: a worker gets the examples as they were tokenized, side by side, in the rows and steps of the plan."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import astuple, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raysft.data.rows import mixture, ray_stream
from raysft.data.rows.collate import Batch
from raysft.data.rows.node_reader import NodeReader
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.ray_stream import Piece, plan_pieces, read_pieces, split_block
from raysft.data.rows.row_plan import rows_for_rank
from raysft.data.shards import ray_pipeline
from raysft.data.types import IGNORE_INDEX
from raysft.errors import RequestError
from tests.shards import data_config, the_set, write_records, written

CAPACITY = 128
WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "a", "list", "of", "three", "animals"]


def records(count: int, seed: int) -> list[list[str]]:
    random = np.random.default_rng(seed)
    return [[" ".join(random.choice(WORDS, random.integers(1, 5))) for _ in range(2)] for _ in range(count)]


@pytest.fixture(scope="module")
def model(tokenizer_with) -> str:
    return tokenizer_with()


@pytest.fixture(scope="module")
def rows(tmp_path_factory, model) -> PackedDataset:
    """Two sources in several shards each."""
    folder: Path = tmp_path_factory.mktemp("stream")
    write_records(folder / "a.jsonl", records(70, 1))
    write_records(folder / "b.jsonl", records(45, 2))
    config = data_config(folder, ["a", "b"], sequence_length=CAPACITY)
    sets = [the_set(config, model, source) for source in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_pipeline, "SHARD_RECORDS", 20)
        manifests = [written(each, model) for each in sets]
    assert [len(manifest.shards) for manifest in manifests] == [4, 3]
    rows = PackedDataset(
        manifests=tuple(each.manifest.location for each in sets), capacity=CAPACITY, global_batch_size=4, epochs=2
    )
    assert len(rows.row_plan.segments.examples) > 3 * rows.row_plan.rows, "rows hold too few examples to test packing"
    assert rows.row_plan.step_rows[:-1].min() < 4, "the first epoch fills its last step, so that no row is empty"
    return rows


@pytest.fixture(scope="module")
def originals(rows) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of all examples, read from the shards in the order of the manifests."""
    found = []
    for files in rows._files:
        for path in files.paths():
            table = pq.read_table(path.local)
            found += zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True)
    return found


def split_examples(batch: Batch, index: int) -> list[tuple[list[int], list[int]]]:
    """Split a row into the ids and labels of its examples, where positions start again."""
    tokens = int(batch["tokens"][index])
    ids, labels, positions = (batch[name][index, :tokens] for name in ("input_ids", "labels", "position_ids"))
    starts = [*np.flatnonzero(positions == 0).tolist(), tokens]
    return [(ids[start:end].tolist(), labels[start:end].tolist()) for start, end in pairwise(starts)]


def loss_tokens_of(batch: Batch) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum())


def equal(left: Batch, right: Batch) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("layout", ["packed", "single"])
def test_rows_hold_the_examples_of_the_plan_as_they_were_tokenized(rows, originals, layout):
    rows = replace(rows, layout=layout)
    batch = rows.batch(range(rows.row_plan.rows))
    for index in range(rows.row_plan.rows):
        expected = [originals[example] for example in rows.row_plan.row(index)]
        assert split_examples(batch, index) == [(ids, [IGNORE_INDEX, *labels[1:]]) for ids, labels in expected]
    assert batch["tokens"].sum() == 2 * sum(len(ids) for ids, _ in originals)


def test_positions_start_again_at_each_example_and_where_padding_begins(rows):
    batch = rows.batch(range(rows.row_plan.rows))
    for index in range(rows.row_plan.rows):
        lengths = [len(ids) for ids, _ in split_examples(batch, index)]
        assert len(lengths) == len(rows.row_plan.row(index))
        parts = [*lengths, CAPACITY - sum(lengths)]
        assert batch["position_ids"][index].tolist() == [place for part in parts for place in range(part)]
        assert (batch["labels"][index, sum(lengths) :] == IGNORE_INDEX).all()


def test_the_first_token_of_each_example_has_no_label_even_with_train_on_prompt(model, tmp_path):
    write_records(tmp_path / "a.jsonl", records(20, 3))
    each = the_set(data_config(tmp_path, train_on_prompt=True, sequence_length=CAPACITY), model)
    manifest = written(each, model)
    whole = PackedDataset((each.manifest.location,), CAPACITY, global_batch_size=3)
    batch = whole.batch(range(whole.row_plan.rows))
    assert (batch["labels"][batch["position_ids"] == 0] == IGNORE_INDEX).all()
    assert loss_tokens_of(batch) == manifest.loss_tokens.sum() == (manifest.lengths - 1).sum()


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_labels_of_a_step_add_up_to_its_loss_denominator_for_any_number_of_workers(rows, workers):
    steps = [list(rows.steps(0, worker, workers)) for worker in range(workers)]
    assert {len(each) for each in steps} == {rows.row_plan.steps}
    for step in range(rows.row_plan.steps):
        assert sum(loss_tokens_of(each[step]) for each in steps) == rows.row_plan.step_loss_tokens[step]
        assert sum(each[step]["tokens"].sum() for each in steps) == rows.row_plan.step_tokens[step]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_the_rows_of_a_step_are_divided_in_order_and_the_rest_are_fillers(workers):
    for step, expected in ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [8, 9])):
        shares = [rows_for_rank(10, 4, step, worker, workers).tolist() for worker in range(workers)]
        assert len({len(each) for each in shares}) == 1
        numbers = [number for each in shares for number in each]
        assert [number for number in numbers if number >= 0] == expected
        assert len(numbers) < 4 + workers


def test_a_filler_row_has_no_labels_and_no_tokens(rows):
    batch = rows.batch([0, -1])
    assert batch["row"].tolist() == [0, -1]
    assert batch["tokens"][1] == 0
    assert (batch["labels"][1] == IGNORE_INDEX).all()
    assert batch["position_ids"][1].tolist() == list(range(CAPACITY))


def test_an_empty_row_between_epochs_is_a_filler_with_a_number(rows):
    step = int(np.flatnonzero(rows.row_plan.step_rows < 4)[0])
    batch = rows.batch(rows.rows_for_rank(step, 0, 1))
    assert batch["row"].tolist() == list(range(4 * step, 4 * step + 4))
    filled = int(rows.row_plan.step_rows[step])
    fillers = rows.batch([-1] * (4 - filled))
    assert all(np.array_equal(batch[name][filled:], fillers[name]) for name in batch if name != "row")
    assert (batch["tokens"][:filled] > 0).all()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_automatic_batch_size_gives_the_rows_of_that_number(rows, workers):
    decided = pickle.loads(pickle.dumps(replace(rows, global_batch_size=None, epochs=20)))
    number = decided.row_plan.global_batch_size
    assert number > 1, "with one row in a step every number would pass"
    assert decided.row_plan.steps >= 100
    given = replace(decided, global_batch_size=number)
    for worker in range(workers):
        pairs = zip(decided.steps(0, worker, workers), given.steps(0, worker, workers), strict=True)
        assert all(equal(left, right) for left, right in pairs)


def test_a_later_start_gives_the_remaining_steps(rows):
    whole, rest = list(rows.steps(0, 1, 2)), list(rows.steps(3, 1, 2))
    assert len(rest) == len(whole) - 3
    assert all(equal(left, right) for left, right in zip(whole[3:], rest, strict=True))


def columns(*pieces: Piece) -> dict[str, np.ndarray]:
    """Pieces as a data task receives them."""
    return {name: np.array(values) for name, *values in zip(ray_stream.COLUMNS, *map(astuple, pieces), strict=True)}


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(
    ("block_tokens", "task_rows", "group"), [(1 << 18, 4096, 10_000), (2 * 4 * CAPACITY, 8, 40), (1, 1, 1)]
)
def test_each_worker_gets_the_blocks_that_it_would_read_itself(
    rows, monkeypatch, workers, first, block_tokens, task_rows, group
):
    monkeypatch.setattr(ray_stream, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(ray_stream, "TASK_ROWS", task_rows)
    monkeypatch.setattr(mixture, "GROUP_EXAMPLES", group)
    rows = replace(rows)
    pieces = list(plan_pieces(rows.row_plan, first, workers))
    tables = [table for piece in pieces for table in read_pieces(columns(piece), rows, workers)]
    assert {table.num_rows for table in tables} == {1}
    for worker in range(workers):
        streamed = list(rows.batches(tables[worker::workers], workers))
        read = list(rows.steps(first, worker, workers))
        assert len(streamed) == len(read) == rows.row_plan.steps - first
        assert all(equal(left, right) for left, right in zip(streamed, read, strict=True))


def test_a_block_is_split_into_its_steps(rows):
    _, table = read_pieces(columns(Piece(0, 2)), rows, 2)
    first, second = split_block(table, 2)
    assert equal(first, rows.batch([2, 3]))
    assert equal(second, rows.batch([6, 7]))


@pytest.mark.parametrize(("workers", "on_nodes"), [(1, [1]), (5, [2, 2, 1]), (7, [7])])
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("block_tokens", [1 << 18, 2 * 4 * CAPACITY, 1])
def test_the_readers_of_nodes_give_each_worker_its_rows_whoever_asks_first(
    rows, monkeypatch, workers, on_nodes, first, block_tokens
):
    monkeypatch.setattr(ray_stream, "BLOCK_TOKENS", block_tokens)
    stop, per_block = rows.row_plan.steps, ray_stream.steps_per_block(rows.row_plan, workers)
    starts, ranks = range(first, stop, per_block), iter(range(workers))
    for on_node in on_nodes:
        own = [next(ranks) for _ in range(on_node)]
        reader = NodeReader(rows, own, workers)
        asked = [(start, worker) for start in starts for worker in own]
        if block_tokens == 1:  # more blocks than a reader keeps
            asked = np.random.default_rng(0).permutation(asked).tolist()
        tables = {(start, worker): reader.block(start, min(start + per_block, stop), worker) for start, worker in asked}
        for worker in own:
            read = list(rows.batches((tables[start, worker] for start in starts), workers))
            expected = list(rows.steps(first, worker, workers))
            assert len(read) == len(expected) == stop - first
            assert all(equal(left, right) for left, right in zip(read, expected, strict=True))


def test_a_reader_makes_the_blocks_of_all_its_workers_at_once(rows, monkeypatch):
    """They draw from the same shards, which would be decompressed for each of them otherwise."""
    reader, made = NodeReader(rows, [3, 4], 6), []
    batch = PackedDataset.batch
    monkeypatch.setattr(PackedDataset, "batch", lambda self, numbers: made.append(len(numbers)) or batch(self, numbers))
    for worker in (4, 3):
        for step in (0, 1):
            reader.block(step, step + 1, worker)
    assert made == [2, 2]


def test_with_many_workers_blocks_are_smaller(rows):
    small, large = (
        ray_stream.steps_per_block(replace(rows.row_plan, global_batch_size=workers, capacity=64), workers)
        for workers in (1000, 16)
    )
    assert (small, large) == ((1 << 22) // 1000 // 64, (1 << 18) // 64)


def test_slices_name_the_shard_and_the_position_in_it(rows):
    slices = rows._find_slices([3, -1, 0])
    expected = [*rows.row_plan.row(3), *rows.row_plan.row(0)]
    assert slices.counts.tolist() == [len(rows.row_plan.row(3)), 0, len(rows.row_plan.row(0))]
    sizes = [20, 20, 20, 10, 20, 20, 5]
    starts = np.cumsum([0, *sizes])
    assert (starts[slices.shards] + slices.positions).tolist() == expected
    assert (slices.positions < np.array(sizes)[slices.shards]).all()


def test_a_pickled_dataset_leaves_out_what_can_be_computed_again(rows):
    assert rows.row_plan.rows > 0
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again == rows
    assert equal(again.batch([0, 5]), rows.batch([0, 5]))


def test_a_dataset_that_changes_on_the_way_has_the_rows_of_both(rows, originals, tmp_path):
    """Two epochs of both sources, then two of the second alone; also after a round trip through JSON."""
    changed = replace(rows, manifests=rows.manifests[1:], epochs=4, earlier=replace(rows, epochs=2))
    assert PackedDataset.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    kept = rows.row_plan.steps
    for step in range(kept):
        ours, theirs = changed.batch(changed.rows_for_rank(step, 0, 1)), rows.batch(rows.rows_for_rank(step, 0, 1))
        filled = theirs["row"] >= 0
        for name in theirs:
            np.testing.assert_array_equal(ours[name][filled], theirs[name][filled], err_msg=name)
    alone = replace(rows, manifests=rows.manifests[1:], epochs=4)
    first = replace(alone, epochs=2).row_plan.steps
    for step, step_alone in zip(range(kept, changed.row_plan.steps), range(first, alone.row_plan.steps), strict=True):
        ours, theirs = (
            changed.batch(changed.rows_for_rank(step, 0, 1)),
            alone.batch(alone.rows_for_rank(step_alone, 0, 1)),
        )
        for name in ("input_ids", "labels", "position_ids", "tokens"):
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
        assert set(ours["sources"][ours["labels"] != IGNORE_INDEX].tolist()) == {2}, (
            "sources are numbered after the earlier ones"
        )
    assert changed.sources == ("a", "b", "b")


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_that_ends_before_the_data_changes_has_the_earlier_rows(rows, epochs):
    other = replace(rows, manifests=rows.manifests[1:], epochs=epochs, earlier=replace(rows, epochs=2))
    before = replace(rows, epochs=epochs)
    assert other.row_plan.steps == before.row_plan.steps
    for step in range(before.row_plan.steps):
        ours, theirs = (each.batch(each.rows_for_rank(step, 0, 1)) for each in (other, before))
        np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    assert replace(other, max_steps=1).row_plan.steps == 1


def test_a_stored_dataset_is_readable_without_its_cache(rows, tmp_path):
    described = rows.to_dict()
    gone = PackedDataset.from_dict({**described, "manifests": [str(tmp_path / "gone" / "manifest.parquet")]})
    assert gone.to_dict()["global_batch_size"] == described["global_batch_size"]
    with pytest.raises(RequestError) as caught:
        _ = gone.row_plan
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/gone/manifest.parquet: ")
    assert "missing; restore data.cache, or choose another run.name" in message


def test_the_same_epochs_are_recognized_in_any_cache_and_for_any_number_of_epochs(rows):
    moved = tuple(path.replace("/shards/", "/elsewhere/shards/") for path in rows.manifests)
    assert rows.has_same_epochs(replace(rows, manifests=moved, epochs=7, max_steps=3))
    for other in (
        {"seed": 1},
        {"manifests": rows.manifests[:1]},
        {"mixing": "all_exhausted"},
        {"mixing_weights": (1.0, 2.0)},
    ):
        assert not rows.has_same_epochs(replace(rows, **other))


def test_the_content_of_rows_is_that_of_the_files_wherever_they_lie(rows, tmp_path):
    moved = []
    for path in rows.manifests:
        shutil.copytree(Path(path).parent, tmp_path / Path(path).parent.name)
        moved.append(str(tmp_path / Path(path).parent.name / Path(path).name))
    content = rows.content()
    assert json.loads(json.dumps(content)) == json.loads(json.dumps(replace(rows, manifests=tuple(moved)).content()))
    assert str(Path(rows.manifests[0]).parent.parent) not in json.dumps(content)
    for other in ({"capacity": 32}, {"layout": "single"}, {"shuffle": False}, {"global_batch_size": 3}):
        assert replace(rows, **other).content() != content
    later = replace(rows, earlier=rows)
    assert later.content() == {**content, "earlier": content}
