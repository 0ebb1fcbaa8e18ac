"""Refuse columns whose values would run code when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysft.storage.path import StoragePath

PICKLE_EXTENSION = "ray.data.arrow_pickled_object"
"""Extension type of Ray Data for Python objects. Once Ray Data is imported, pyarrow unpickles the values of such a column,
wherever the file comes from."""


def refuse_pickles(schema: pa.Schema) -> None:
    """Check every column and its nested types; call it before any value is read.

    Raises:
        pa.ArrowInvalid: a column contains pickled objects.
    """
    for field in schema:
        if PICKLE_EXTENSION in _extensions(field):
            raise pa.ArrowInvalid(f"column {field.name!r} contains pickled Python objects, which could run code")


def read_table(path: StoragePath, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file of the cache, which is not trusted as others may write to it. Local files are memory-mapped.

    Raises:
        pa.ArrowException: the file is damaged or contains pickled objects.
    """
    # A remote file is fetched first, so that only fetching it is retried, and not decoding a damaged one.
    source = path.local or pa.BufferReader(path.read_bytes())
    table = pq.read_table(source, columns=list(columns) if columns else None, memory_map=True)
    refuse_pickles(table.schema)
    return table


def _extensions(field: Any) -> Iterator[str]:
    """Names of all extension types in a field; the name of a type that is not registered is in the metadata."""
    yield (field.metadata or {}).get(b"ARROW:extension:name", b"").decode(errors="replace")
    kind = field.type
    while isinstance(kind, pa.BaseExtensionType):
        yield kind.extension_name
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        yield from _extensions(pa.field("", kind.value_type))
    for index in range(kind.num_fields):
        yield from _extensions(kind.field(index))
