"""Parquet and Arrow: records are read as they were before the file format gave all of them the same fields."""

from __future__ import annotations

import io
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raysft.data.sources.arrow import arrow_records, parquet_records
from raysft.data.sources.json_stream import Unreadable


def through_parquet(table: pa.Table) -> list[Any]:
    out = io.BytesIO()
    pq.write_table(table, out)
    return [record for _, _, record in parquet_records(pa.BufferReader(out.getvalue()))]


def through_arrow(table: pa.Table, new=pa.ipc.new_file) -> list[Any]:
    out = io.BytesIO()
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return [record for _, _, record in arrow_records(pa.BufferReader(out.getvalue()))]


def through_stream(table: pa.Table) -> list[Any]:
    return through_arrow(table, pa.ipc.new_stream)


ALL = pytest.mark.parametrize("through", [through_parquet, through_arrow, through_stream])
VALUES = [
    {"a": 1, "deep": {"x": {"y": "z"}}},
    {"b": [{"c": 1}, {"d": None, "e": [None, "f"]}, {}], "deep": {}},
    {},
    None,
    {"deep": {"x": {}}, "b": []},
]


@ALL
def test_a_record_has_no_keys_of_other_records(through):
    records = through(pa.table({"v": VALUES}))
    assert (
        [record["v"] for record in records]
        == [
            VALUES[0],
            {
                "b": [{"c": 1}, {"e": [None, "f"]}, {}],
                "deep": {},
            },  # a null that was written cannot be told from a missing key
            *VALUES[2:],
        ]
    )


@ALL
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.struct({"a": pa.string(), "b": pa.string()})),
        pa.large_list(pa.struct({"a": pa.large_string(), "b": pa.large_string()})),
        pa.list_(pa.struct({"a": pa.dictionary(pa.int32(), pa.string()), "b": pa.string()})),
        pa.list_(pa.struct({"a": pa.binary(), "b": pa.large_binary()})),
        pa.list_(pa.struct({"a": pa.string(), "b": pa.string()}), 2),
    ],
    ids=str,
)
def test_lists_of_structs_of_every_kind_of_text_are_the_same(through, kind):
    values = [[{"a": "ä"}, {"b": "y"}], None, [{}, {"a": "x", "b": ""}]]
    if "binary" in str(kind):
        written = [each and [{k: v.encode() for k, v in turn.items()} for turn in each] for each in values]
    else:
        written = values
    column = pa.array(written, kind)
    assert [record["v"] for record in through(pa.table({"v": column}))] == values


def test_views_of_texts_and_of_lists_are_the_same():
    values = [[{"a": "ä"}, {"b": "y"}], None, []]
    written = [[{"a": "ä"}, {"b": b"y"}], None, []]
    column = pa.array(written, pa.list_view(pa.struct({"a": pa.string_view(), "b": pa.binary_view()})))
    assert [record["v"] for record in through_arrow(pa.table({"v": column}))] == values


@ALL
def test_a_map_has_the_keys_of_its_own_record_and_its_nulls(through):
    kind = pa.map_(pa.string(), pa.struct({"type": pa.string(), "default": pa.int64()}))
    values = [{"a": {"type": "x"}, "b": None}, {}, {"c": {"default": 1}}]
    column = pa.array([None if value is None else list(value.items()) for value in values], kind)
    assert [record["v"] for record in through(pa.table({"v": column}))] == values


def test_a_map_with_a_duplicate_key_rejects_its_own_record_only():
    column = pa.array([[("a", 1), ("a", 2)], [("a", 1)]], pa.map_(pa.string(), pa.int64()))
    bad, good = through_arrow(pa.table({"v": column}))
    assert isinstance(bad, Unreadable)
    assert "duplicate key 'a'" in bad.reason
    assert good == {"v": {"a": 1}}


@ALL
def test_json_columns_keep_their_nulls(through):
    texts = ['{"a": null, "b": [1, null]}', "[]", '"x"', None]
    inner = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    column = pa.ListArray.from_arrays(pa.array(range(5), pa.int32()), inner)
    values = [{"a": None, "b": [1, None]}, [], "x", None]
    assert [record["v"] for record in through(pa.table({"v": column}))] == [[value] for value in values]


def test_invalid_json_in_a_column_rejects_its_own_record_only():
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{", "{}"]))
    bad, good = through_arrow(pa.table({"v": column}))
    assert isinstance(bad, Unreadable)
    assert good == {"v": {}}


@ALL
@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (pa.date32(), date(2024, 7, 26), "2024-07-26"),
        (pa.timestamp("us"), datetime(2024, 7, 26, 1, 2, 3), "2024-07-26T01:02:03"),
        (pa.timestamp("ns"), datetime(2024, 7, 26), "2024-07-26T00:00:00"),
        (pa.time64("us"), time(1, 2, 3), "01:02:03"),
        (pa.decimal128(10, 0), Decimal("12"), 12),
        (pa.decimal128(10, 2), Decimal("1.50"), 1.5),
        (pa.float32(), 0.1, 0.1),
        (pa.float16(), 0.1, 0.1),
        (pa.float64(), 0.1, 0.1),
        (pa.binary(), b"\xff", b"\xff"),
        (pa.bool_(), False, False),
        (pa.uint64(), 2**63, 2**63),
    ],
    ids=str,
)
def test_values_in_structs_are_those_of_json(through, kind, value, read):
    column = pa.array([{"a": value}, {}, {"a": None}], pa.struct({"a": kind}))
    records = through(pa.table({"v": column, "w": pa.array([value, None, None], kind)}))
    assert records == [{"v": {"a": read}, "w": read}, {"v": {}, "w": None}, {"v": {}, "w": None}]
