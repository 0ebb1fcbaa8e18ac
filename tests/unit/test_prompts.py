"""Prompts of a file: names in memory, tokens in a file of their own, batches by length."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysft.data.shards import prompts as written_prompts
from raysft.data.shards.manifest import load_manifest
from raysft.data.shards.media_column import MEDIA
from raysft.data.shards.prompts import write_prompts
from raysft.data.types import TokenizedMedium
from raysft.errors import RequestError
from raysft.generate import prompts as read_prompts
from raysft.generate.engine_actor import batch_row
from raysft.generate.prompts import ModelPrompts, Prompts, media_of
from raysft.storage.path import StoragePath

LENGTHS = np.random.default_rng(0).integers(1, 9, 50)


def table(lengths=LENGTHS, kind: pa.DataType | None = None) -> pa.Table:
    count = len(lengths)
    ids = pa.array([list(range(number, number + n)) for number, n in enumerate(lengths)], kind or pa.list_(pa.int32()))
    columns = {
        "id": [f"s/{number}" for number in range(count)],
        "source": ["s"] * count,
        "prompt": [f"text {number}" for number in range(count)],
        "label": [None if number % 7 == 0 else f"label {number}" for number in range(count)],
    }
    return pa.table({**columns, "input_ids": ids})


def file(folder: Path, content: pa.Table, **options) -> Path:
    pq.write_table(content, folder / "prompts.parquet", **options)
    return folder / "prompts.parquet"


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64())])
@pytest.mark.parametrize("at_once", [1000, 3])
def test_a_file_is_read_without_its_texts_and_nothing_of_it_stays_beside_it(tmp_path, monkeypatch, kind, at_once):
    monkeypatch.setattr(read_prompts, "READ_ROWS", at_once)
    content = table(kind=kind).replace_schema_metadata({"end_tokens": "[7, 9]"})
    prompts = Prompts.read(file(tmp_path, content, row_group_size=4))
    assert os.listdir(tmp_path) == ["prompts.parquet"]
    assert not hasattr(prompts.tokens, "getvalue"), "tokens are in memory"
    assert (len(prompts), prompts.end_tokens) == (50, (7, 9))
    some = np.array([3, 0, 49])
    expected = content.take(pa.array(some))
    assert prompts.table(some)["id"].to_pylist() == expected["id"].to_pylist()
    assert prompts.table(some)["input_ids"].to_pylist() == expected["input_ids"].to_pylist()
    assert (
        list(prompts.texts())
        == content.drop_columns("input_ids").select(["id", "source", "prompt", "label"]).to_pylist()
    )


def test_a_batch_holds_prompts_of_similar_length_the_longest_first_and_a_rest_at_the_beginning(tmp_path):
    asked = ModelPrompts.all("m", Prompts.read(file(tmp_path, table())))
    batches = list(asked.batches(8))
    assert [len(batch) for batch in batches] == [2, *[8] * 6]
    found = [id for batch in batches for id in batch["id"].to_pylist()]
    # By definition: the order of a stable sort by length.
    assert found == [f"s/{number}" for number in sorted(range(50), key=lambda number: -LENGTHS[number])]
    done = np.zeros(50, bool)
    done[[0, 7]] = True
    left = asked.without(done)
    assert len(left) == 48
    assert left.ids == [f"s/{number}" for number in range(50) if number not in (0, 7)]
    assert sorted(id for batch in left.batches(5) for id in batch["id"].to_pylist()) == sorted(left.ids)
    assert left.without(done).ids == left.ids
    assert list(left.without(~done).batches(5)) == []


def test_no_prompts_are_no_batches(tmp_path):
    asked = ModelPrompts.all("m", Prompts.read(file(tmp_path, table([]))))
    assert len(asked) == 0
    assert list(asked.batches(4)) == []
    assert list(asked.prompts.texts()) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (table().drop_columns("label"), "the prompts lack the column 'label' (of "),
        (pa.concat_tables([table(), table()]), "two of 100 prompts have the same id; make the ids unique"),
        (None, "the prompts cannot be read as Parquet ("),
    ],
)
def test_what_are_no_prompts_is_refused(tmp_path, content, told):
    path = tmp_path / "prompts.parquet"
    path.write_bytes(b"PAR1 and no more") if content is None else file(tmp_path, content)
    with pytest.raises(RequestError) as caught:
        Prompts.read(path)
    assert str(caught.value).startswith(f"{path}: {told}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("limit", [None, 9])
def test_prompts_are_the_same_however_many_are_written_at_a_time(tmp_path, monkeypatch, rows, limit):
    from tests.synthetic import write_set

    monkeypatch.setattr(written_prompts, "ROWS", rows)
    path = write_set(tmp_path / "s", LENGTHS + 2, shard_examples=8)
    manifest = load_manifest(StoragePath(path))
    for number, shard in enumerate(manifest.shard_paths()):
        content = table(LENGTHS[8 * number : 8 * number + 8])
        columns = {"source": content["source"], "prompt": content["prompt"], "reference": content["label"]}
        numbers = [str(8 * number + place) for place in range(len(content))]
        # The first prompt of each shard is of a record that has none.
        ids = [[], *content["input_ids"].to_pylist()[1:]]
        pq.write_table(
            pa.table({**columns, "record": numbers, "prompt_ids": pa.array(ids, pa.list_(pa.int32()))}), shard.local
        )
    written = tmp_path / "prompts.parquet"
    count = write_prompts([manifest], written, limit, [4])
    chosen = range(50) if limit is None else np.linspace(0, 49, 9).round().astype(int)
    assert pq.read_table(written)["id"].to_pylist() == [f"s/{number}" for number in chosen if number % 8]
    assert count == len(Prompts.read(written))
    assert Prompts.read(written).end_tokens == (4,)
    assert pq.ParquetFile(written).num_row_groups >= (2 if rows == 1 else 1)


def test_images_are_handed_on_with_their_prompts_if_there_are_any(tmp_path):
    medium = TokenizedMedium("image", "a.png", "00", 8, 9, 1, 3)
    listed = [[asdict(medium)] if number in (3, 49) else [] for number in range(50)]
    with_images = table().append_column("media", pa.array(listed, MEDIA))
    prompts = Prompts.read(file(tmp_path, with_images, row_group_size=4))
    some = prompts.table(np.array([3, 0, 49]))
    assert media_of(some) == [(medium,), (), (medium,)]
    assert media_of(Prompts.of(with_images).table(np.array([0, 3]))) == [(), (medium,)]
    assert [each["media"] for each in prompts.texts()] == listed
    assert batch_row(some, 1)["media"].to_pylist() == [[listed[3], [], listed[49]]]
    without = table().append_column("media", pa.array([[]] * 50, MEDIA))
    prompts = Prompts.read(file(tmp_path, without))
    assert prompts.media is None
    assert prompts.table(np.array([3])).column_names == ["id", "input_ids"]
    assert media_of(prompts.table(np.array([3]))) == []
    assert "media" not in next(prompts.texts())
