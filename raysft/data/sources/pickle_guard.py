"""Columns whose values would run code when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysft.storage.path import StoragePath

PICKLE_EXTENSION = "ray.data.arrow_pickled_object"
"""The extension type in which Ray Data keeps Python objects. Once Ray Data is imported, pyarrow unpickles the values of such a
column, wherever the file comes from."""


def refuse_pickles(schema: pa.Schema) -> None:
    """Look at every column, and inside of it, before a value is read.

    Raises:
        pa.ArrowInvalid: one holds pickled objects.
    """
    for field in schema:
        if PICKLE_EXTENSION in _extensions(field):
            raise pa.ArrowInvalid(f"column {field.name!r} holds pickled Python objects, which could run code")


def read_table(place: StoragePath, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file of the cache, which others may write into too; a local one stays on the disk until it is looked at."""
    # From elsewhere it is fetched first: what is wrong with its content is nothing to wait for.
    source = place.local or pa.BufferReader(place.read_bytes())
    table = pq.read_table(source, columns=list(columns) if columns else None, memory_map=True)
    refuse_pickles(table.schema)
    return table


def _extensions(field: Any) -> Iterator[str]:
    """Names of the extension types in a field; where nobody registered a type, its name stands in the metadata."""
    yield (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    kind = field.type
    while isinstance(kind, pa.BaseExtensionType):
        yield kind.extension_name
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        yield from _extensions(pa.field("", kind.value_type))
    for index in range(kind.num_fields):
        yield from _extensions(kind.field(index))
