"""Read segments of examples from shards and place them side by side in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raysft.data.rows.row_layouts import ranges
from raysft.data.rows.row_media import Placed, rows_of_media, segment_media
from raysft.data.sources.pickle_guard import read_table
from raysft.data.types import IGNORE_INDEX
from raysft.storage.path import StoragePath

OPEN_SHARD_BYTES = 96 << 20
"""Approximate size of the decompressed shards that a process caches for its next rows."""

Batch = dict[str, np.ndarray]
"""``row`` [rows] int64 number of the row (−1: a filler without labels); ``tokens`` [rows] int64 without padding; ``input_ids``,
``labels``, ``position_ids`` [rows, capacity] int32. With several sources also ``sources`` [rows, capacity] int32 number of each
token's source; with weighted examples ``weights`` [rows, capacity] float32 weight of each token in the loss; if one of the rows
has images ``media`` [rows] tuples of ``RowMedium``, in order of position."""


@dataclass(frozen=True)
class RowSlices:
    """Where to read the segments of some rows; compact, because a task receives thousands of them."""

    rows: np.ndarray
    """[rows] numbers of the rows, −1 for a filler."""
    counts: np.ndarray
    """[rows] segments in each."""
    shards: np.ndarray
    """[segments] index of the shard."""
    positions: np.ndarray
    """[segments] position of the example in its shard."""
    starts: np.ndarray
    """[segments] first token of the example to read."""
    stops: np.ndarray
    """[segments] the token after the last."""
    sources: np.ndarray | None = None
    """[segments] number of the source; None if there is only one."""
    weights: np.ndarray | None = None
    """[segments] weight of each token in the loss; None if all are 1."""


def collate(
    slices: RowSlices, paths: Sequence[str], capacity: int, document_mask: bool = True, with_media: bool = False
) -> Batch:
    """Read the segments of some rows and place them side by side.

    Args:
        slices: where the segments are.
        paths: paths of the shards.
        capacity: tokens in a row.
        document_mask: restart positions at each segment, which keeps segments apart; otherwise a row's segments are one text.
            Positions always restart where padding begins.
        with_media: some of the shards have images.
    """
    rows, lengths = len(slices.rows), (slices.stops - slices.starts).astype(np.int64)
    row = np.repeat(np.arange(rows), slices.counts)
    tokens = np.bincount(row, lengths, minlength=rows).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    # Start of each segment in all rows, one after another.
    starts = row * capacity + before - (np.cumsum(tokens) - tokens)[row]
    media = _read_media(slices, paths, row, starts - row * capacity) if with_media else None
    # From here on segments are ordered by shard, so that each shard is read once.
    order = np.argsort(slices.shards, kind="stable")
    starts, lengths = starts[order], lengths[order]
    within = ranges(lengths)
    destination = np.repeat(starts, lengths) + within
    ids, labels = _read_tokens(slices, order, paths, lengths, within)
    # Nothing predicts the first token of a segment, or of a row.
    firsts = np.cumsum(lengths) - lengths
    labels[firsts if document_mask else firsts[starts % capacity == 0]] = IGNORE_INDEX

    def place(values: np.ndarray, empty: np.ndarray | int, dtype: type) -> np.ndarray:
        placed = np.empty((rows, capacity), dtype)
        placed[:] = empty
        placed.reshape(-1)[destination] = values
        return placed

    padding = np.maximum(np.arange(capacity) - tokens[:, None], 0)
    batch: Batch = {
        "row": slices.rows,
        "tokens": tokens,
        "input_ids": place(ids, 0, np.int32),
        "labels": place(labels, IGNORE_INDEX, np.int32),
        "position_ids": place(within if document_mask else destination % capacity, padding, np.int32),
    }
    if slices.sources is not None:
        batch["sources"] = place(np.repeat(slices.sources[order], lengths), 0, np.int32)
    if slices.weights is not None:
        batch["weights"] = place(np.repeat(slices.weights[order], lengths), 0, np.float32)
    if media is not None:
        batch["media"] = media
    return batch


def _read_tokens(
    slices: RowSlices, order: np.ndarray, paths: Sequence[str], lengths: np.ndarray, within: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Read ids and labels of all segments.

    Args:
        slices: where the segments are.
        order: [segments] their order by shard.
        paths: paths of the shards.
        lengths: [segments] tokens of each, in that order.
        within: [tokens] position of each token in its segment.

    Returns:
        [tokens] int32 ids and labels, segment after segment in that order.
    """
    ids, labels = np.empty((2, len(within)), np.int32)
    shards, positions, starts = slices.shards[order], slices.positions[order], slices.starts[order]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(shards)] if len(shards) else []
    for first, stop in pairwise(bounds):
        of_shard = slice(ends[first], ends[stop])
        for values, (tokens, offsets) in zip((ids, labels), _open_shard(paths[int(shards[first])]), strict=True):
            begins = offsets[positions[first:stop]] + starts[first:stop]
            values[of_shard] = tokens[np.repeat(begins, lengths[first:stop]) + within[of_shard]]
    return ids, labels


def _read_media(slices: RowSlices, paths: Sequence[str], row: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
    """Read the images of all segments.

    Args:
        slices: where the segments are.
        paths: paths of the shards.
        row: [segments] index of the row.
        offsets: [segments] first token in the row.

    Returns:
        [rows] tuples of ``RowMedium``; None if there are none.
    """
    found = []
    for segment in np.argsort(slices.shards, kind="stable").tolist():
        path, position = paths[int(slices.shards[segment])], int(slices.positions[segment])
        column, counts = open_media(path)
        if len(counts) and counts[position]:
            begins, ends = int(slices.starts[segment]), int(slices.stops[segment])
            placed = Placed(int(row[segment]), int(offsets[segment]), begins, ends, path, position)
            found.extend(segment_media(column, placed))
    return rows_of_media(found, len(slices.rows)) if found else None


@lru_cache(maxsize=16)
def open_media(path: str) -> tuple[Any, np.ndarray]:
    """Return column ``media`` of a shard, and how many each example has; both are empty if none has any."""
    file = StoragePath(path)
    if "media" not in file.read(pq.read_schema).names:
        return (), np.empty(0, np.int32)
    column = read_table(file, ["media"])["media"].combine_chunks()
    return column, column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)


_open_shards: dict[str, tuple[Any, ...]] = {}


def _open_shard(path: str) -> tuple[Any, Any]:
    """Return (tokens, offsets) of a shard's ids and of its labels.

    The latest shards stay in memory, because every row of a group draws from all of the group's shards.
    """
    if path not in _open_shards:
        while (
            sum(values.nbytes for shard in _open_shards.values() for column in shard for values in column)
            > OPEN_SHARD_BYTES
        ):
            _open_shards.pop(next(iter(_open_shards)))
        table = read_table(StoragePath(path), ["input_ids", "labels"])
        columns = [table[name].combine_chunks() for name in ("input_ids", "labels")]
        _open_shards[path] = tuple((column.values.to_numpy(), column.offsets.to_numpy()) for column in columns)
    return _open_shards[path]
