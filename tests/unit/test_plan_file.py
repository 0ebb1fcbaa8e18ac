"""A row plan is written once, and every process that needs it maps the same file."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raysft.data.rows import packed_dataset, plan_file, ray_stream
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.data.rows.row_plan import RowPlan
from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from tests.synthetic import write_set

RANDOM = np.random.default_rng(3)
LENGTHS = RANDOM.integers(2, 60, 400)
WEIGHTS = np.round(RANDOM.random(400), 2)


def dataset(folder: Path | StoragePath) -> PackedDataset:
    paths = (
        write_set(folder / "a", LENGTHS[:250], 0, 60),
        write_set(folder / "b", LENGTHS[250:], 1, 60, WEIGHTS[250:]),
    )
    return PackedDataset(paths, 64, 8, epochs=2)


def plans(folder: Path) -> list[Path]:
    return sorted(folder.rglob("rows-*"))


def equal(left: RowPlan, right: RowPlan) -> bool:
    names = (*plan_file.PLAIN, *plan_file.STEP_SUMS)
    pairs = [*zip(left.segments, right.segments, strict=True), *((getattr(left, n), getattr(right, n)) for n in names)]
    return all(np.array_equal(one, other) for one, other in pairs) and left.capacity == right.capacity


def no_planning(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is planned, or a manifest read, although the plan is known")

    for name in ("plan_rows", "load_manifest"):
        monkeypatch.setattr(packed_dataset, name, refuse)


def test_the_file_holds_the_whole_plan_and_another_process_needs_no_more(tmp_path, monkeypatch):
    rows = dataset(tmp_path)
    planned = rows._plan()
    assert rows.row_plan.segments.examples.dtype == np.int32
    assert not rows.row_plan.segments.examples.flags.owndata, "it is not mapped, but read"
    assert equal(rows.row_plan, planned.row_plan)
    assert len(plans(tmp_path)) == 1
    batch = rows.batch([0, 5, -1])
    sent = pickle.dumps(rows)
    plan_file.open_plan.cache_clear()
    no_planning(monkeypatch)
    for path in rows.manifests:
        Path(path).unlink()  # a worker reads only shards and the plan
    there = pickle.loads(sent)
    assert equal(there.row_plan, planned.row_plan)
    assert there.sources == ("a", "b")
    assert all(np.array_equal(there.batch([0, 5, -1])[name], batch[name]) for name in batch)
    assert there.records(0) == rows.records(0)


def test_a_resumed_run_maps_the_plan_of_the_first_one(tmp_path, monkeypatch):
    first = dataset(tmp_path).row_plan
    plan_file.open_plan.cache_clear()
    no_planning(monkeypatch)
    again = PackedDataset(tuple(str(tmp_path / name / "manifest.parquet") for name in "ab"), 64, 8, epochs=2)
    assert equal(again.row_plan, first)


def test_what_decides_the_rows_decides_the_file(tmp_path):
    rows = dataset(tmp_path)
    others = [
        replace(rows, **change)
        for change in (
            {"seed": 1}, {"epochs": 3}, {"max_steps": 2}, {"capacity": 80}, {"layout": "single"}, {"shuffle": False},
            {"global_batch_size": 4}, {"global_batch_size": None}, {"mixing": "first_exhausted"},
            {"mixing": "first_exhausted", "mixing_weights": (3.0, 1.0)}, {"epochs": 3, "earlier": replace(rows, epochs=1)},
        )
    ]  # fmt: skip
    places = {each._plan_place for each in (rows, *others)}
    assert len(places) == len(others) + 1
    assert all(each.row_plan.rows for each in (rows, *others))
    shutil.rmtree(tmp_path / "b")
    write_set(tmp_path / "b", LENGTHS[250:], 1, 40)  # written again, into other shards
    assert replace(rows)._plan_place not in places


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0 and then nothing", "table", "cut"])
def test_a_damaged_file_is_written_again(tmp_path, content):
    rows = dataset(tmp_path)
    whole = rows._plan().row_plan
    place = rows._plan_place.local
    assert rows.row_plan.rows
    if content == "table":
        table = pa.table({"offsets": [[1, 2]]})
        with pa.ipc.new_file(str(place), table.schema) as writer:
            writer.write_table(table)
    else:
        place.write_bytes(place.read_bytes()[: place.stat().st_size // 2] if content == "cut" else content)
    plan_file.open_plan.cache_clear()
    assert equal(replace(rows).row_plan, whole)
    plan_file.open_plan.cache_clear()
    assert equal(plan_file.open_plan(rows._plan_place).row_plan, whole)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), StorageFailed("full")])
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, error):
    rows = dataset(tmp_path)

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(plan_file, "write_plan", refuse)
    assert rows.row_plan.rows == rows._plan().row_plan.rows
    assert plans(tmp_path) == []
    there = pickle.loads(pickle.dumps(rows))
    assert equal(there.row_plan, rows.row_plan)


def test_a_plan_that_vanished_is_made_again(tmp_path):
    rows = dataset(tmp_path)
    sent = pickle.dumps(replace(rows)), rows.row_plan
    known = pickle.dumps(rows)
    plans(tmp_path)[0].unlink()
    plan_file.open_plan.cache_clear()
    for each in (sent[0], known):
        assert equal(pickle.loads(each).row_plan, sent[1])


def test_in_an_object_store_a_node_copies_the_plan_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = dataset(StoragePath(server.uri("plans/shards")))
    local = rows._plan().row_plan
    assert equal(rows.row_plan, local)
    sent = pickle.dumps(rows)
    server.requests.clear()
    no_planning(monkeypatch)
    for _ in range(2):
        plan_file.open_plan.cache_clear()
        assert equal(pickle.loads(sent).row_plan, local)
    assert not [each for each in server.requests if each.startswith("GET /bucket/")]
    assert equal(pickle.loads(sent).row_plan, local)


def test_numbers_that_need_64_bits_have_them():
    from raysft.data.rows.mixture import index_type

    assert [index_type(numbers) for numbers in (1, (1 << 31) - 1, 1 << 31)] == [np.int32, np.int32, np.int64]


def test_a_task_is_told_which_steps_and_not_where_their_rows_are(tmp_path):
    rows = dataset(tmp_path)
    pieces = list(ray_stream.plan_pieces(rows.row_plan, 0, 4))
    assert {type(number) for piece in pieces for number in astuple(piece)} == {int}
