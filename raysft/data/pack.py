"""Put examples of different lengths into rows of one length with as little padding as possible."""

from __future__ import annotations

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Assign examples to rows by best fit, longest first, never splitting one.

    Works on the histogram of lengths (Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination"): all
    examples of one length go at once into all rows with the least sufficient room, so that the cost depends on the number of
    different lengths more than on that of examples.

    Args:
        lengths: [examples] tokens in each example.
        capacity: tokens that one row holds (``data.sequence_length``).

    Returns:
        For each row the indices of its examples; they total at most ``capacity`` tokens. Examples of one length are taken
        in the order given.

    Raises:
        ValueError: an example is longer than ``capacity``, or has no token.

    >>> [row.tolist() for row in pack(np.array([3, 5, 2]), capacity=5)]
    [[1], [0, 2]]
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an example has {lengths.max()} tokens and a row holds {capacity}")
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"an example has {lengths.min()} tokens, so no row would hold it")
    patterns = _patterns(
        np.bincount(lengths, minlength=capacity + 1) if len(lengths) else np.zeros(capacity + 1, int), capacity
    )
    by_length = np.argsort(lengths, kind="stable")
    next_of_length = np.searchsorted(lengths[by_length], np.arange(capacity + 1))
    rows = []
    for pattern, count in patterns:
        for _ in range(count):
            row = np.empty(len(pattern), np.int64)
            for place, length in enumerate(pattern):
                row[place] = by_length[next_of_length[length]]
                next_of_length[length] += 1
            rows.append(row)
    return rows


def _patterns(histogram: np.ndarray, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """(lengths in a row, number of such rows), by best fit over the histogram."""
    # open_rows[room]: rows with that much room left, as (pattern, count); the bits of `rooms` say which are not empty.
    open_rows: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for length in range(capacity, 0, -1):
        left = int(histogram[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                pattern, count = open_rows[room].pop()
                taken = min(left, count)
                if taken < count:
                    open_rows[room].append((pattern, count - taken))
                if not open_rows[room]:
                    rooms &= ~(1 << room)
            else:
                # No open row has room for one; each new row takes as many as go into it.
                each = min(capacity // length, left)
                pattern, room, taken = (length,) * (each - 1), capacity - (each - 1) * length, left // each
                left -= taken * (each - 1)
            open_rows[room - length].append(((*pattern, length), taken))
            rooms |= 1 << (room - length)
            left -= taken
    return [row for rows in open_rows for row in rows]
