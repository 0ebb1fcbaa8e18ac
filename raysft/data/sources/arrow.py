"""Read Parquet and Arrow files as the records that a JSON file would hold.

All values of a struct column have the same fields, so a record that lacks a key has a null in its place. These nulls are
removed; otherwise every function would have the parameters of all other functions, and every call their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.sources.json_stream import JSON, Unreadable
from raysft.data.sources.pickle_guard import refuse_pickles
from raysft.data.types import Record
from raysft.errors import one_line

BATCH_RECORDS = 1000
"""Records that are converted to Python objects together."""
IndexedRecord = tuple[int, int, Record | Unreadable]
"""(index in the file, approximate bytes, record)."""
Converter = Callable[[Any], Any]


def parquet_records(source: Any) -> Iterator[IndexedRecord]:
    """Read the records of an open Parquet file, batch by batch."""
    file = pq.ParquetFile(source)
    refuse_pickles(file.schema_arrow)
    yield from _indexed_records(file.iter_batches(batch_size=BATCH_RECORDS))


def arrow_records(source: Any) -> Iterator[IndexedRecord]:
    """Read the records of an open Arrow file, in the file format or in the stream format that ``datasets`` writes."""
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


def _indexed_records(batches: Iterator[pa.RecordBatch]) -> Iterator[IndexedRecord]:
    index = 0
    for large_batch in batches:
        for start in range(0, len(large_batch), BATCH_RECORDS):
            batch = large_batch.slice(start, BATCH_RECORDS)
            size = batch.nbytes // max(1, len(batch))
            for record in _records(batch):
                yield index, size, record
                index += 1


def _records(batch: pa.RecordBatch) -> Iterator[Record | Unreadable]:
    names = batch.schema.names
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise pa.ArrowInvalid(f"two columns are named {duplicates[0]!r}")
    try:
        columns = [_json_values(column) for column in batch.columns]
    except (ValueError, OverflowError, RecursionError) as error:
        # Invalid UTF-8, dates outside Python's range, duplicate keys: find the record that has them.
        if len(batch) == 1:
            yield Unreadable(f"contains a value that does not fit its column's type ({one_line(error)})")
            return
        for row in range(len(batch)):
            yield from _records(batch.slice(row, 1))
        return
    for row in range(len(batch)):
        yield {name: values[row] for name, values in zip(names, columns, strict=True)}


def _json_values(column: pa.Array) -> list[Any]:
    convert = _converter(column.type)
    values = column.to_pylist()
    return values if convert is None else [None if value is None else convert(value) for value in values]


def _converter(kind: pa.DataType) -> Converter | None:
    """Function that converts a non-null value of a type to its JSON equivalent; None if the value is one already."""
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
    return next((convert for is_type, convert in CONVERTERS if is_type(kind)), None)


def _struct(converters: dict[str, Converter | None]) -> Converter:
    return lambda value: {
        name: convert(inner) if (convert := converters[name]) else inner
        for name, inner in value.items()
        if inner is not None
    }


def _map(inner: Converter | None) -> Converter:
    """A map has the keys of its own record only, so its nulls are values."""

    def convert(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return {key: inner(value) if inner and value is not None else value for key, value in pairs}

    return convert


def _list(inner: Converter) -> Converter:
    return lambda values: [None if value is None else inner(value) for value in values]


def _decode_bytes(content: bytes) -> str | bytes:
    """Decode binary columns that hold text. Other bytes stay bytes, which no field accepts."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _decimal_to_number(value: Any) -> int | float:
    return int(value) if value.as_tuple().exponent >= 0 else float(value)


def _float_converter(kind: type[np.floating]) -> Converter:
    """Convert float16 or float32 to the shortest decimal: 0.1, not 0.10000000149011612."""
    return lambda value: float(str(kind(value)))


EXTENSION_CONVERTERS: dict[str, Converter] = {"arrow.json": JSON.decode, "arrow.uuid": str}
"""Converters by extension type. ``datasets`` stores values of mixed types as ``arrow.json``, where a null is a real value."""
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
