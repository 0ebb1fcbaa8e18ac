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

BATCH_RECORDS = 1000
"""Records that become Python objects at once."""
Item = tuple[int, int, Record | Unreadable]
"""(index in the file, bytes about, record)."""
Converter = Callable[[Any], Any]


def parquet_records(source: Any) -> Iterator[Item]:
    """Records of an open Parquet file, batch by batch."""
    whole = pq.ParquetFile(source)
    refuse_pickles(whole.schema_arrow)
    yield from _indexed_records(whole.iter_batches(batch_size=BATCH_RECORDS))


def arrow_records(source: Any) -> Iterator[Item]:
    """Records of an open Arrow file of either kind: the one with random access, or the stream that ``datasets`` writes."""
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        refuse_pickles(stream.schema)
        yield from _indexed_records(iter(stream))
    else:
        refuse_pickles(reader.schema)
        yield from _indexed_records(reader.get_batch(number) for number in range(reader.num_record_batches))


def _indexed_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Item]:
    index = 0
    for whole in batches:
        for start in range(0, len(whole), BATCH_RECORDS):
            batch = whole.slice(start, BATCH_RECORDS)
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
        columns = [_json_values(column) for column in batch.columns]
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


def _json_values(column: pa.Array) -> list[Any]:
    change = _converter(column.type)
    values = column.to_pylist()
    return values if change is None else [None if value is None else change(value) for value in values]


def _converter(kind: pa.DataType) -> Converter | None:
    """What makes a value of a type the one that JSON would hold; None where it is that already. Nulls are not given to it."""
    if isinstance(kind, pa.BaseExtensionType):
        return EXTENSION_CONVERTERS.get(kind.extension_name) or _converter(kind.storage_type)
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _converter(kind.value_type)
    if types.is_struct(kind):
        return _struct({field.name: _converter(field.type) for field in kind})
    if types.is_map(kind):
        return _map(_converter(kind.item_type))
    if hasattr(kind, "value_type"):  # lists of every kind
        inner = _converter(kind.value_type)
        return inner and _list(inner)
    return next((change for fits, change in CONVERTERS if fits(kind)), None)


def _struct(changes: dict[str, Converter | None]) -> Converter:
    return lambda value: {
        name: each(inner) if (each := changes[name]) else inner for name, inner in value.items() if inner is not None
    }


def _map(inner: Converter | None) -> Converter:
    """A map has the keys of its own record: a null is a value there."""

    def change(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return {key: inner(value) if inner and value is not None else value for key, value in pairs}

    return change


def _list(inner: Converter) -> Converter:
    return lambda values: [None if value is None else inner(value) for value in values]


def _decode_bytes(content: bytes) -> str | bytes:
    """Text that its writer did not call text; other bytes stay, and no field takes them."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _decimal_to_number(value: Any) -> int | float:
    return int(value) if value.as_tuple().exponent >= 0 else float(value)


def _float_converter(kind: type[np.floating]) -> Converter:
    """0.1 and not 0.10000000149011612, which is how the nearest number of 32 bits reads in 64."""
    return lambda value: float(str(kind(value)))


EXTENSION_CONVERTERS: dict[str, Converter] = {"arrow.json": JSON.decode, "arrow.uuid": str}
"""``arrow.json`` is how ``datasets`` keeps values that have no one type: a null inside of it was written as one."""
CONVERTERS: tuple[tuple[Callable[[pa.DataType], bool], Converter], ...] = (
    (
        lambda kind: pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind),
        lambda v: v.isoformat(),
    ),
    (pa.types.is_decimal, _decimal_to_number),
    (
        lambda kind: (
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or pa.types.is_fixed_size_binary(kind)
            or pa.types.is_binary_view(kind)
        ),
        _decode_bytes,
    ),
    (pa.types.is_float16, _float_converter(np.float16)),
    (pa.types.is_float32, _float_converter(np.float32)),
)
