"""Pack examples of different lengths into rows of one length with as little padding as possible."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign examples to rows by best fit, longest first, without splitting any.

    The algorithm works on the histogram of lengths (after Krell et al. 2021, "Efficient Sequence Packing without
    Cross-contamination"): a combination of lengths that fills one row fills as many rows as there are examples of these lengths,
    so the cost depends on the number of different lengths more than on the number of examples. A row ends with two examples
    that fill it exactly wherever such a pair exists.

    Args:
        lengths: [examples] tokens in each example.
        capacity: tokens in a row (``data.sequence_length``).

    Returns:
        [examples] int64 indices of the examples, row by row, and [rows + 1] int64 offsets: row r holds the indices offsets[r] to
        offsets[r + 1], which have at most ``capacity`` tokens together. Examples of one length keep their order.

    Raises:
        ValueError: an example is longer than ``capacity``, or empty.

    >>> indices, offsets = pack(np.array([3, 5, 2]), capacity=5)
    >>> indices.tolist(), offsets.tolist()
    ([1, 0, 2], [0, 1, 3])
    """
    if not len(lengths):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    if lengths.max() > capacity:
        raise ValueError(f"an example has {lengths.max()} tokens, but a row holds only {capacity}")
    if lengths.min() < 1:
        raise ValueError(f"an example has {lengths.min()} tokens, but a row needs at least 1")
    patterns = _patterns(np.bincount(lengths, minlength=capacity + 1), capacity)
    narrow = np.uint16 if capacity < 1 << 16 else np.int32  # NumPy sorts 16 bits in linear time
    row_by_row = np.fromiter(chain.from_iterable(row * repeats for row, repeats in patterns), narrow, len(lengths))
    indices = np.empty(len(lengths), np.int64)
    # The slots of one length, in order, take the examples of that length, in order.
    indices[np.argsort(row_by_row, kind="stable")] = np.argsort(lengths.astype(narrow), kind="stable")
    sizes = np.repeat([len(row) for row, _ in patterns], [repeats for _, repeats in patterns])
    return indices, np.concatenate([[0], np.cumsum(sizes)])


def _patterns(histogram: np.ndarray, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Return (lengths in a row, number of such rows).

    A row starts with the longest length. It continues with two that fill it exactly, or else with the longest that fits.

    Bit l of ``available`` is set if an example of l tokens is left, and so is bit capacity − l of ``mirrored``. Shifting one
    against the other shows all pairs of lengths with a given sum.
    """
    left: list[int] = histogram.tolist()
    lengths = np.flatnonzero(histogram).tolist()
    available = sum(1 << length for length in lengths)
    mirrored = sum(1 << (capacity - length) for length in lengths)
    patterns = []
    while available:
        row: list[int] = []
        free, length = capacity, available.bit_length() - 1
        while length > 0:
            chosen: tuple[int, ...] = (length,)
            if row and length < free:
                pairs = available & ((1 << free) - 1) & (mirrored >> (capacity - free))
                longer = pairs.bit_length() - 1
                if longer >= 0 and (2 * longer != free or left[longer] > 1):
                    chosen = longer, free - longer
            for taken in chosen:
                row.append(taken)
                free -= taken
                left[taken] -= 1
                if not left[taken]:
                    available ^= 1 << taken
                    mirrored ^= 1 << (capacity - taken)
            length = (available & ((2 << free) - 1)).bit_length() - 1
        repeats = 0
        if all(map(left.__getitem__, row)):  # rarely, where there are many lengths
            counts = Counter(row)
            repeats = min(left[length] // count for length, count in counts.items())
            for length, count in counts.items():
                left[length] -= count * repeats
                if not left[length]:
                    available &= ~(1 << length)
                    mirrored &= ~(1 << (capacity - length))
        patterns.append((tuple(row), 1 + repeats))
    return patterns
