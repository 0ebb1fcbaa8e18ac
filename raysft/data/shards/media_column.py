"""The column of Parquet files in which the media of examples or prompts are listed, with the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from raysft.data.types import TokenizedMedium

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
        }
    )
)
"""Type of the column; the fields are those of ``TokenizedMedium``."""


def media_column(media: Sequence[tuple[TokenizedMedium, ...]]) -> pa.Array:
    """Build the column from the media of each example."""
    return pa.array([[asdict(medium) for medium in each] for each in media], MEDIA)
