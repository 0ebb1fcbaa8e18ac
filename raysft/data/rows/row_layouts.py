"""Lay examples out in rows: packed whole, one in each row, or one stream of tokens cut into full rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from raysft.data.rows.packing import pack

Layout = Literal["packed", "single", "joined"]
"""``packed``: several whole examples in a row; ``single``: one example in a row; ``joined``: one stream of tokens, cut into full
rows."""


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
    rows = pack(lengths[examples], capacity)
    order = random.permutation(len(rows)) if random else np.argsort([row.min() for row in rows], kind="stable")
    rows = [rows[row] for row in order.tolist()]
    chosen = examples[np.concatenate(rows)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Segments(offsets, chosen, np.zeros(len(chosen), np.int64), lengths[chosen], loss_tokens[chosen])


def single(examples: np.ndarray, lengths: np.ndarray, loss_tokens: np.ndarray, capacity: int) -> Segments:
    """Give each example a row of its own.

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


def joined(examples: np.ndarray, lengths: np.ndarray, capacity: int, document_mask: bool) -> Segments:
    """Cut the stream of all examples into full rows; only the last row of an epoch is short.

    A row that begins inside an example begins with the last token of the row before, so that each token is predicted once. The
    loss covers every token that has one before it.

    Args:
        examples: indices of the examples, in order.
        lengths: [all examples] tokens.
        capacity: tokens in a row.
        document_mask: predict no token from the example before.
    """
    ends = np.cumsum(lengths[examples])
    total = int(ends[-1])
    starts = _joined_row_starts(ends, capacity, document_mask)
    stops = np.minimum(starts + capacity, total)
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

    Args:
        ends: [examples] positions at which examples end.
        capacity: tokens in a row.
        document_mask: predict no token from the example before.
    """
    total = int(ends[-1])
    if not document_mask:  # the first token of an example is predicted too
        return np.arange(0, max(1, total - 1), capacity - 1, dtype=np.int64)
    starts = [0]
    borders = ends.tolist()
    number = 0
    while (stop := starts[-1] + capacity) < total:
        while borders[number] < stop:
            number += 1
        starts.append(stop if borders[number] == stop else stop - 1)
    return np.asarray(starts, np.int64)


def ranges(counts: np.ndarray) -> np.ndarray:
    """Return the ranges from 0 to each count, one after the other.

    >>> ranges(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def concatenate(parts: Sequence[Segments]) -> Segments:
    """Put the rows of several layouts one after the other."""
    first_segments = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + first for part, first in zip(parts, first_segments, strict=False)]
    return Segments(
        np.concatenate([[0], *offsets]).astype(np.int64),
        *(np.concatenate([part[field] for part in parts]).astype(np.int64) for field in range(1, 5)),
    )


def empty_rows(rows: int) -> Segments:
    """Return rows without segments."""
    return Segments(np.zeros(rows + 1, np.int64), *np.empty((4, 0), np.int64))


def slice_rows(segments: Segments, start: int, stop: int) -> Segments:
    """Return the rows from ``start`` up to ``stop``."""
    offsets = segments.offsets[start : stop + 1]
    return Segments(offsets - offsets[0], *(values[offsets[0] : offsets[-1]] for values in segments[1:]))
