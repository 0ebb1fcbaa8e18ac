"""The column of Parquet files in which the media of examples or prompts are listed, with the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from raysft.data.sources.pickle_guard import read_table
from raysft.data.types import TokenizedMedium
from raysft.storage.path import StoragePath

MEDIA = pa.list_(
    pa.struct(
        {
            "kind": pa.string(),
            "location": pa.string(),
            "digest": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "start": pa.int32(),
            "stop": pa.int32(),
            "size": pa.int64(),
        }
    )
)
"""Type of the column; the fields are those of ``TokenizedMedium``."""


def record_of(path: StoragePath, position: int) -> str:
    """Name the source and the record of an example of a shard, for messages."""
    table = read_table(path, ["source", "record"])
    (example,) = table.slice(position, 1).to_pylist()
    return f"{example['source']}: {example['record']}"


def media_column(media: Sequence[tuple[TokenizedMedium, ...]]) -> pa.Array:
    """Build the column from the media of each example."""
    return pa.array([[asdict(medium) for medium in each] for each in media], MEDIA)
