"""The images of packed rows: found in the shards, read from their files, and sent along with the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raysft.data.shards.media_column import MEDIA, record_of
from raysft.data.types import RowMedium, TokenizedMedium
from raysft.media import files
from raysft.storage.path import StoragePath

READERS = 8
"""Threads that read files of images."""
STORED = tuple(field.name for field in fields(TokenizedMedium))
"""Fields of a medium in a shard."""
TYPE = pa.list_(pa.struct([*MEDIA.value_type.fields, ("content", pa.large_binary()), ("fault", pa.string())]))
"""The media of a row, as Ray Data carries them."""


class Placed(NamedTuple):
    """A segment of an example that has media."""

    row: int
    offset: int
    """Its first token in the row."""
    start: int
    """Its first token in the example."""
    stop: int
    path: str
    """Of its shard."""
    position: int
    """Of the example in the shard."""


def segment_media(column: Any, placed: Placed) -> Iterator[tuple[Placed, RowMedium]]:
    """Yield the media of a segment as its row has them, without the bytes.

    Args:
        column: ``media`` of the shard.
        placed: the segment.
    """
    for stored in column[placed.position].as_py() or ():
        if placed.start <= stored["start"] and stored["stop"] <= placed.stop:
            medium, shift = RowMedium(**{name: stored[name] for name in STORED}), placed.offset - placed.start
            yield placed, replace(medium, start=medium.start + shift, stop=medium.stop + shift)


def rows_of_media(found: Sequence[tuple[Placed, RowMedium]], rows: int) -> np.ndarray:
    """Read the files of media, each once, and sort them by row.

    Returns:
        [rows] tuples of ``RowMedium``, in order of position.
    """
    wanted = list(dict.fromkeys((medium.location, medium.digest) for _, medium in found))
    with ThreadPoolExecutor(min(READERS, len(wanted)) or 1, "read media") as readers:
        contents = dict(zip(wanted, readers.map(_read, wanted), strict=True))
    by_row: list[list[RowMedium]] = [[] for _ in range(rows)]
    for placed, medium in found:
        content = contents[medium.location, medium.digest]
        if isinstance(content, str):
            by_row[placed.row].append(
                replace(medium, fault=f"{record_of(StoragePath(placed.path), placed.position)}: {content}")
            )
        else:
            by_row[placed.row].append(replace(medium, content=content))
    return _object_array([tuple(sorted(media, key=lambda medium: medium.start)) for media in by_row])


def _read(file: tuple[str, str]) -> bytes | str:
    """Return a file's bytes, or why it cannot be used: the worker that needs it ends the training, not the task that reads it."""
    try:
        return files.read(*file)
    except files.Unreadable as error:
        return str(error)


def to_arrow(media: np.ndarray) -> pa.Array:
    """Return the media of some rows as one value of a column."""
    return pa.array([[[asdict(medium) for medium in of_row] for of_row in media]], pa.list_(TYPE))


def from_arrow(values: Any) -> np.ndarray:
    """Return [rows] tuples of ``RowMedium`` from the lists of some rows."""
    names = [field.name for field in fields(RowMedium)]
    return _object_array(
        [
            tuple(RowMedium(**{name: medium[name] for name in names}) for medium in of_row)
            for of_row in values.to_pylist()
        ]
    )


def _object_array(rows: list[tuple[RowMedium, ...]]) -> np.ndarray:
    made = np.empty(len(rows), object)
    made[:] = rows
    return made
