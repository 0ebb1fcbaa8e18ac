"""How examples become rows: whole ones side by side, one in each, or one stream of tokens cut into full rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from raysft.data.rows.packing import pack

Layout = Literal["packed", "single", "joined"]
"""How examples become rows: several whole ones in a row; one in each row; or one stream of tokens, cut into full rows."""


class Segments(NamedTuple):
    """Parts of examples, row by row."""

    offsets: np.ndarray
    """[rows + 1] row r holds the pieces offsets[r] to offsets[r + 1]."""
    examples: np.ndarray
    """[pieces] index of the example, over all sources in their order."""
    starts: np.ndarray
    """[pieces] first token of the example that the piece holds."""
    stops: np.ndarray
    """[pieces] the token after its last."""
    loss_tokens: np.ndarray
    """[pieces] trained tokens."""


def packed(
    examples: np.ndarray,
    lengths: np.ndarray,
    loss_tokens: np.ndarray,
    capacity: int,
    random: np.random.Generator | None,
) -> Segments:
    """Whole examples, several in a row, by best fit."""
    rows = pack(lengths[examples], capacity)
    order = random.permutation(len(rows)) if random else np.argsort([row.min() for row in rows], kind="stable")
    rows = [rows[row] for row in order.tolist()]
    chosen = examples[np.concatenate(rows)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Segments(offsets, chosen, np.zeros(len(chosen), np.int64), lengths[chosen], loss_tokens[chosen])


def single(examples: np.ndarray, lengths: np.ndarray, loss_tokens: np.ndarray, capacity: int) -> Segments:
    """One example in a row; a longer one in several, each of which begins with the last token of the one before."""
    counts = np.maximum(1, -(-(lengths[examples] - 1) // (capacity - 1)))
    chosen = np.repeat(examples, counts)
    starts = ranges(counts) * (capacity - 1)
    stops = np.minimum(starts + capacity, lengths[chosen])
    whole = np.repeat(counts == 1, counts)
    return Segments(
        np.arange(len(chosen) + 1), chosen, starts, stops, np.where(whole, loss_tokens[chosen], stops - starts - 1)
    )


def joined(examples: np.ndarray, lengths: np.ndarray, capacity: int, document_mask: bool) -> Segments:
    """All examples as one stream of tokens, cut into full rows; only the last one of an epoch is short.

    A row that begins inside an example begins with the last token of the row before, so that each token is predicted once.
    """
    ends = np.cumsum(lengths[examples])
    total = int(ends[-1])
    row_starts = [0]
    if document_mask:
        borders = ends.tolist()
        at = 0
        while (stop := row_starts[-1] + capacity) < total:
            while borders[at] < stop:
                at += 1
            row_starts.append(stop if borders[at] == stop else stop - 1)
    else:
        # Here an example's first token is predicted too, from the end of the one before.
        row_starts = list(range(0, max(1, total - 1), capacity - 1))
    starts = np.asarray(row_starts, np.int64)
    stops = np.minimum(starts + capacity, total)
    first = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, stops, side="left") - first + 1
    row = np.repeat(np.arange(len(starts)), counts)
    index = np.repeat(first, counts) + ranges(counts)
    begin = ends[index] - lengths[examples[index]]
    segment_starts = np.maximum(starts[row], begin) - begin
    segment_stops = np.minimum(stops[row], ends[index]) - begin
    offsets = np.concatenate([[0], np.cumsum(counts)])
    loss_tokens = segment_stops - segment_starts
    if document_mask:
        loss_tokens -= 1
    else:
        loss_tokens[offsets[:-1]] -= 1
    return Segments(offsets, examples[index], segment_starts, segment_stops, loss_tokens)


def ranges(counts: np.ndarray) -> np.ndarray:
    """0 to each count, one after the other.

    >>> ranges(np.array([2, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def chain(parts: Sequence[Segments]) -> Segments:
    before = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[1:] + first for part, first in zip(parts, before, strict=False)]
    return Segments(
        np.concatenate([[0], *offsets]).astype(np.int64),
        *(np.concatenate([part[field] for part in parts]).astype(np.int64) for field in range(1, 5)),
    )


def empty(rows: int) -> Segments:
    """Rows that hold nothing."""
    return Segments(np.zeros(rows + 1, np.int64), *np.empty((4, 0), np.int64))


def cut(segments: Segments, rows: int, first: int = 0) -> Segments:
    """The rows from ``first`` up to ``rows``."""
    offsets = segments.offsets[first : rows + 1]
    return Segments(offsets - offsets[0], *(values[offsets[0] : offsets[-1]] for values in segments[1:]))
