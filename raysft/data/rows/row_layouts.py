"""Lay out examples in rows: packed whole, one in each row, or one stream of tokens cut into full rows. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from raysft.data.rows.packing import pack

Layout = Literal["packed", "single", "joined"]
"""``packed``: several whole examples in a row; ``single``: one example in a row; ``joined``: one stream of tokens, cut into full
rows."""
JOINED_ROWS = 1 << 18
"""Rows of a stream that are laid out at a time, which takes about 40 bytes for each of their segments."""
GROWTH = 8
"""When full, arrays grow by one part in this many."""


class Segments(NamedTuple):
    """Parts of examples, row by row."""

    offsets: np.ndarray
    """[rows + 1] row r holds the segments offsets[r] to offsets[r + 1]."""
    examples: np.ndarray
    """[segments] index of the example, over all sources in order."""
    starts: np.ndarray
    """[segments] first token of the example in the segment."""
    stops: np.ndarray
    """[segments] the token after the last."""
    loss_tokens: np.ndarray
    """[segments] tokens that the loss covers."""


def packed(
    examples: np.ndarray,
    lengths: np.ndarray,
    loss_tokens: np.ndarray,
    capacity: int,
    random: np.random.Generator | None,
) -> Segments:
    """Pack whole examples by best fit.

    Args:
        examples: indices of the examples to lay out.
        lengths: [all examples] tokens.
        loss_tokens: [all examples] tokens that the loss covers.
        capacity: tokens in a row.
        random: source of the order of rows; None orders them by their first example.
    """
    indices, offsets = pack(lengths[examples], capacity)
    rows, sizes = len(offsets) - 1, np.diff(offsets)
    first_examples = np.minimum.reduceat(indices, offsets[:-1]) if random is None else np.empty(0)
    order = random.permutation(rows) if random else np.argsort(first_examples, kind="stable")
    chosen = examples[indices[np.repeat(offsets[:-1][order], sizes[order]) + ranges(sizes[order])]]
    offsets = np.concatenate([[0], np.cumsum(sizes[order])])
    return Segments(offsets, chosen, np.zeros(len(chosen), np.int32), lengths[chosen], loss_tokens[chosen])


def single(examples: np.ndarray, lengths: np.ndarray, loss_tokens: np.ndarray, capacity: int) -> Segments:
    """Give each example its own row.

    A longer one gets several rows, each of which begins with the last token of the row before. Arguments as in ``packed``.
    """
    counts = np.maximum(1, -(-(lengths[examples] - 1) // (capacity - 1)))
    chosen = np.repeat(examples, counts)
    starts = ranges(counts) * (capacity - 1)
    stops = np.minimum(starts + capacity, lengths[chosen])
    whole = np.repeat(counts == 1, counts)
    return Segments(
        np.arange(len(chosen) + 1), chosen, starts, stops, np.where(whole, loss_tokens[chosen], stops - starts - 1)
    )


def joined(examples: np.ndarray, lengths: np.ndarray, capacity: int, document_mask: bool) -> Iterator[Segments]:
    """Cut the stream of all examples into full rows; only the last row of an epoch is short.

    A row that begins inside an example begins with the last token of the row before, so that each token is predicted once. The
    loss covers every token that has one before it.

    Args:
        examples: indices of the examples, in order.
        lengths: [all examples] tokens.
        capacity: tokens in a row.
        document_mask: predict no token from the example before.

    Yields:
        The rows, in order, some at a time.
    """
    ends = np.cumsum(lengths[examples], dtype=np.int64)
    starts = _joined_row_starts(ends, capacity, document_mask)
    for first in range(0, len(starts), JOINED_ROWS):
        yield _joined_rows(starts[first : first + JOINED_ROWS], ends, examples, lengths, capacity, document_mask)


def _joined_rows(
    starts: np.ndarray, ends: np.ndarray, examples: np.ndarray, lengths: np.ndarray, capacity: int, document_mask: bool
) -> Segments:
    """Return the rows that begin at some positions in the stream; the other arguments are as in ``joined``."""
    stops = np.minimum(starts + capacity, ends[-1])
    first = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, stops, side="left") - first + 1
    row = np.repeat(np.arange(len(starts)), counts)
    index = np.repeat(first, counts) + ranges(counts)
    example_start = ends[index] - lengths[examples[index]]
    segment_starts = np.maximum(starts[row], example_start) - example_start
    segment_stops = np.minimum(stops[row], ends[index]) - example_start
    offsets = np.concatenate([[0], np.cumsum(counts)])
    loss_tokens = segment_stops - segment_starts
    if document_mask:
        loss_tokens -= 1
    else:
        loss_tokens[offsets[:-1]] -= 1
    return Segments(offsets, examples[index], segment_starts, segment_stops, loss_tokens)


def _joined_row_starts(ends: np.ndarray, capacity: int, document_mask: bool) -> np.ndarray:
    """[rows] int64 positions in the stream at which rows begin.

    A row begins with the last token of the previous row, unless that row ended with an example.

    Args:
        ends: [examples] positions at which examples end.
        capacity: tokens in a row.
        document_mask: predict no token from the example before.
    """
    total, step = int(ends[-1]), capacity - 1
    if not document_mask:  # the first token of an example is predicted too
        return np.arange(0, max(1, total - 1), step, dtype=np.int64)
    parts, start = [], 0
    while (end := _row_end_at_border(ends, start + capacity, step)) is not None:
        parts.append(np.arange(start, end - capacity + 1, step, dtype=np.int64))
        start = end
    more = max(0, -(-(total - start - capacity) // step))
    return np.concatenate([*parts, start + step * np.arange(more + 1, dtype=np.int64)])


def _row_end_at_border(ends: np.ndarray, first: int, step: int) -> int | None:
    """Return the first of the positions first, first + step, … at which an example ends; None if only the last one does."""
    number, size = int(np.searchsorted(ends, first)), max(64, 2 * step)
    while number < len(ends):
        borders = ends[number : number + size]
        found = np.flatnonzero((borders - first) % step == 0)
        if len(found):
            end = int(borders[found[0]])
            return end if end < ends[-1] else None
        number += size
    return None


def ranges(counts: np.ndarray) -> np.ndarray:
    """Return the ranges from 0 to each count, one after another.

    >>> ranges(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


class SegmentsBuilder:
    """Collects the rows of many layouts in arrays that grow in place; joining them at the end would take twice the memory."""

    def __init__(self, index: type[np.signedinteger]) -> None:
        """
        Args:
            index: integer type for numbers of segments and examples.
        """
        self._arrays = [np.zeros(1, index), np.empty(0, index), *(np.empty(0, np.int32) for _ in range(3))]
        self._used = [1, 0, 0, 0, 0]

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self._used[0] - 1

    def append(self, part: Segments) -> None:
        """Append rows."""
        self._add(0, part.offsets[1:] + self._used[1])
        for field in range(1, 5):
            self._add(field, part[field])

    def _add(self, field: int, values: np.ndarray) -> None:
        array, used = self._arrays[field], self._used[field]
        needed = used + len(values)
        if needed > len(array):
            array.resize(max(needed, len(array) + len(array) // GROWTH), refcheck=False)
        array[used:needed] = values
        self._used[field] = needed

    def loss_tokens(self, first: int) -> np.ndarray:
        """[rows] int64 tokens that the loss covers in each row from ``first`` on; none of them may be empty."""
        offsets = self._arrays[0][first : self._used[0]]
        part = self._arrays[4][offsets[0] : offsets[-1]]
        return np.add.reduceat(part, offsets[:-1] - offsets[0], dtype=np.int64)

    def build(self) -> Segments:
        """Return all rows; nothing can be added afterwards."""
        for array, used in zip(self._arrays, self._used, strict=True):
            array.resize(used, refcheck=False)
        return Segments(*self._arrays)


def insert_empty_rows(segments: Segments, after: Sequence[int], rows: Sequence[int]) -> Segments:
    """Insert empty rows.

    Args:
        segments: rows.
        after: counts of rows of ``segments`` after which to insert.
        rows: how many to insert at each of these places.
    """
    if not any(rows):
        return segments
    places = np.repeat(after, rows)
    return Segments(np.insert(segments.offsets, places + 1, segments.offsets[places]), *segments[1:])


def empty_rows(rows: int) -> Segments:
    """Return rows without segments."""
    return Segments(np.zeros(rows + 1, np.int64), *np.empty((4, 0), np.int32))


def slice_rows(segments: Segments, start: int, stop: int) -> Segments:
    """Return the rows from ``start`` up to ``stop``."""
    offsets = segments.offsets[start : stop + 1]
    return Segments(
        offsets - offsets[0] if offsets[0] else offsets, *(values[offsets[0] : offsets[-1]] for values in segments[1:])
    )
