"""Parquet and Arrow files as the records that JSON would hold.

A struct has one set of fields for all records, so that a record which lacks a key has a null there. Such a null is no key:
left in, every function would get the parameters of all others, and every call their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.sources.json_stream import JSON, Unreadable, first_line
from raysft.data.sources.pickle_guard import refuse_pickles
from raysft.data.types import Record

BATCH = 1000
"""Records that become Python objects at once."""
Item = tuple[int, int, Record | Unreadable]
"""(index in the file, bytes about, record)."""
Change = Callable[[Any], Any]


def parquet_records(source: Any) -> Iterator[Item]:
    """Records of an open Parquet file, batch by batch."""
    whole = pq.ParquetFile(source)
    refuse_pickles(whole.schema_arrow)
    yield from _items(whole.iter_batches(batch_size=BATCH))


def arrow_records(source: Any) -> Iterator[Item]:
    """Records of an open Arrow file of either kind: the one with random access, or the stream that ``datasets`` writes."""
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        refuse_pickles(stream.schema)
        yield from _items(iter(stream))
    else:
        refuse_pickles(reader.schema)
        yield from _items(reader.get_batch(number) for number in range(reader.num_record_batches))


def _items(batches: Iterator[pa.RecordBatch]) -> Iterator[Item]:
    index = 0
    for whole in batches:
        for start in range(0, len(whole), BATCH):
            batch = whole.slice(start, BATCH)
            size = batch.nbytes // max(1, len(batch))
            for record in _records(batch):
                yield index, size, record
                index += 1


def _records(batch: pa.RecordBatch) -> Iterator[Record | Unreadable]:
    names = batch.schema.names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise pa.ArrowInvalid(f"two columns are named {twice[0]!r}")
    try:
        columns = [_values(column) for column in batch.columns]
    except (ValueError, OverflowError, RecursionError) as error:
        # Bytes that are no text, dates that Python does not know, a key twice.
        if len(batch) == 1:
            yield Unreadable(f"holds what is no value of its column's type ({first_line(error)})")
            return
        for row in range(len(batch)):
            yield from _records(batch.slice(row, 1))
        return
    for row in range(len(batch)):
        yield {name: values[row] for name, values in zip(names, columns, strict=True)}


def _values(column: pa.Array) -> list[Any]:
    change = _change(column.type)
    values = column.to_pylist()
    return values if change is None else [None if value is None else change(value) for value in values]


def _change(kind: pa.DataType) -> Change | None:
    """What makes a value of a type the one that JSON would hold; None where it is that already. Nulls are not given to it."""
    if isinstance(kind, pa.BaseExtensionType):
        return EXTENSIONS.get(kind.extension_name) or _change(kind.storage_type)
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _change(kind.value_type)
    if types.is_struct(kind):
        return _struct({field.name: _change(field.type) for field in kind})
    if types.is_map(kind):
        return _map(_change(kind.item_type))
    if hasattr(kind, "value_type"):  # lists of every kind
        inner = _change(kind.value_type)
        return inner and _list(inner)
    return next((change for fits, change in PLAIN if fits(kind)), None)


def _struct(changes: dict[str, Change | None]) -> Change:
    return lambda value: {
        name: each(inner) if (each := changes[name]) else inner for name, inner in value.items() if inner is not None
    }


def _map(inner: Change | None) -> Change:
    """A map has the keys of its own record: a null is a value there."""

    def change(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return {key: inner(value) if inner and value is not None else value for key, value in pairs}

    return change


def _list(inner: Change) -> Change:
    return lambda values: [None if value is None else inner(value) for value in values]


def _text_of(content: bytes) -> str | bytes:
    """Text that its writer did not call text; other bytes stay, and no field takes them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _number(value: Any) -> int | float:
    return int(value) if value.as_tuple().exponent >= 0 else float(value)


def _shortest(kind: type[np.floating]) -> Change:
    """0.1 and not 0.10000000149011612, which is how the nearest number of 32 bits reads in 64."""
    return lambda value: float(str(kind(value)))


EXTENSIONS: dict[str, Change] = {"arrow.json": JSON.decode, "arrow.uuid": str}
"""``arrow.json`` is how ``datasets`` keeps values that have no one type: a null inside of it was written as one."""
PLAIN: tuple[tuple[Callable[[pa.DataType], bool], Change], ...] = (
    (
        lambda kind: pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind),
        lambda v: v.isoformat(),
    ),
    (pa.types.is_decimal, _number),
    (
        lambda kind: (
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_fixed_size_binary(kind)
            or pa.types.is_binary_view(kind)
        ),
        _text_of,
    ),
    (pa.types.is_float16, _shortest(np.float16)),
    (pa.types.is_float32, _shortest(np.float32)),
)
