"""Rows with images: each comes with its bytes at its place in the row, whoever reads the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysft.data.rows import ray_stream
from raysft.data.rows.node_reader import NodeReader
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.ray_stream import Piece, blocks, one_row, split_block
from raysft.data.rows.row_media import READERS
from tests.tiny_vision import tiny_processor
from tests.vision_shards import draw, questions, written_with_images


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[PackedDataset, list, object]:
    folder, processor = tmp_path_factory.mktemp("media"), tiny_processor("qwen2.5-vl")
    seen = questions(draw(folder / "images", 12), without=4)
    manifest = written_with_images(folder / "set", processor, seen)
    rows = PackedDataset((str(manifest.path.location),), 128, 4, seed=3)
    return rows, seen, processor


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype
        assert values.tolist() == other[name].tolist(), name


def test_the_images_of_a_row_stand_where_their_tokens_are(data):
    rows, seen, processor = data
    batch = rows.batch(np.arange(rows.row_plan.rows))
    assert rows.has_media
    found = 0
    for ids, media in zip(batch["input_ids"], batch["media"], strict=True):
        assert [each.start for each in media] == sorted(each.start for each in media)
        inside = np.zeros(len(ids), bool)
        for each in media:
            inside[each.start : each.stop] = True
            assert each.content == Path(each.location).read_bytes()
            assert not each.fault
        np.testing.assert_array_equal(inside, ids == processor.image_token_id)
        found += len(media)
    assert found == sum(len(each.images) for each in seen)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_readers_give_the_same_rows(data, workers):
    rows, steps = data[0], data[0].row_plan.steps
    for worker in range(workers):
        alone = list(rows.steps(0, worker, workers))
        reader = NodeReader(rows, list(range(workers)), workers)
        equal_number = 0
        tables = [reader.block(step, step + 1, worker) for step in range(steps)]
        for one, other in zip(alone, rows.batches(tables, workers), strict=True):
            equal({"media": np.empty(0), **one}, {"media": np.empty(0), **other})
            equal_number += 1
        assert equal_number == steps
        numbers = list(blocks(rows.row_plan, Piece(0, steps), workers, rows.media_per_row))[worker::workers]
        tables = [one_row(rows.batch(of_block)) for of_block in numbers]
        for one, other in zip(alone, rows.batches(tables, workers), strict=True):
            equal(one, {name: other[name] for name in one})


def test_a_row_without_images_beside_one_with(data):
    batch = data[0].batch([*range(data[0].row_plan.rows), -1])
    assert batch["media"][-1] == ()
    (restored,) = split_block(one_row(batch), len(batch["row"]))
    equal(batch, restored)


def test_rows_of_text_alone_have_no_column(tmp_path):
    manifest = written_with_images(tmp_path / "set", tiny_processor("llava"), questions([], without=6))
    rows = PackedDataset((str(manifest.path.location),), 64, 2)
    assert not rows.has_media
    batch = rows.batch([0, 1])
    assert "media" not in batch
    assert all(not pa.types.is_struct(kind.value_type) for kind in one_row(batch).schema.types)


def test_blocks_with_images_are_smaller(data, monkeypatch):
    rows, seen, _ = data
    plan = rows.row_plan
    assert rows.media_per_row == sum(len(each.images) for each in seen) / plan.rows
    monkeypatch.setattr(ray_stream, "BLOCK_MEDIA", 30)
    assert ray_stream.steps_per_block(plan, 1, 3.0) == 2  # steps of 4 rows
    assert ray_stream.steps_per_block(plan, 2, 3.0) == 5
    assert ray_stream.steps_per_block(plan, 1, 30.0) == 1
    assert ray_stream.steps_per_block(plan, 1) == ray_stream.BLOCK_TOKENS // 512


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_a_changed_file_is_named_with_its_record(tmp_path, change):
    files = draw(tmp_path / "images", READERS)
    manifest = written_with_images(tmp_path / "set", tiny_processor("llava"), questions(files[:1]))
    rows = PackedDataset((str(manifest.path.location),), 64, 1)
    files[0].unlink() if change == "missing" else files[0].write_bytes(files[1].read_bytes())
    (media,) = rows.batch([0])["media"]
    reason = "cannot be read" if change == "missing" else "has changed since it was tokenized"
    assert media[0].fault.startswith(f"d: f:1: {files[0]}: {reason}")
    assert not media[0].content


@pytest.mark.parametrize("rows_at_once", [1, 3])
@pytest.mark.parametrize("layout", ["packed", "single"])
def test_the_microbatch_with_the_most_images_is_found(data, layout, rows_at_once):
    rows, _, processor = data
    rows = replace(rows, layout=layout)
    ids = rows.batch(np.arange(rows.row_plan.rows))["input_ids"]
    of_rows = (ids == processor.image_token_id).sum(1).tolist()
    most = max(sum(of_rows[first : first + rows_at_once]) for first in range(0, len(of_rows), rows_at_once))
    load = rows.image_load(rows_at_once)
    assert load is not None
    # It has 3 × 2 parts of 28 × 28 pixels, with a token each.
    assert (load.width, load.height) == (84, 56)
    assert load.per_row == pytest.approx(most / 6 / rows_at_once)


def test_rows_of_text_alone_load_nothing(tmp_path):
    manifest = written_with_images(tmp_path / "set", tiny_processor("llava"), questions([], without=6))
    assert PackedDataset((str(manifest.path.location),), 64, 2).image_load(2) is None
