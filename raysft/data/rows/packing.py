"""Pack examples of different lengths into rows of one length with as little padding as possible."""

from __future__ import annotations

from collections import Counter

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Assign examples to rows by best fit, longest first, without splitting any.

    The algorithm works on the histogram of lengths (after Krell et al. 2021, "Efficient Sequence Packing without
    Cross-contamination"): a combination of lengths that fills one row fills as many rows as there are examples of these lengths,
    so that the cost depends on the number of different lengths more than on the number of examples. A row ends with two examples
    that fill it exactly wherever there are two.

    Args:
        lengths: [examples] tokens in each example.
        capacity: tokens in a row (``data.sequence_length``).

    Returns:
        For each row the indices of its examples, which have at most ``capacity`` tokens together. Examples of one length keep
        their order.

    Raises:
        ValueError: an example is longer than ``capacity``, or empty.

    >>> [row.tolist() for row in pack(np.array([3, 5, 2]), capacity=5)]
    [[1], [0, 2]]
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"an example has {lengths.max()} tokens, but a row holds only {capacity}")
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"an example has {lengths.min()} tokens, but a row needs at least 1")
    patterns = _patterns(
        np.bincount(lengths, minlength=capacity + 1) if len(lengths) else np.zeros(capacity + 1, int), capacity
    )
    by_length = np.argsort(lengths, kind="stable")
    next_of_length = np.searchsorted(lengths[by_length], np.arange(capacity + 1))
    rows = []
    for pattern, count in patterns:
        for _ in range(count):
            row = np.empty(len(pattern), np.int64)
            for index, length in enumerate(pattern):
                row[index] = by_length[next_of_length[length]]
                next_of_length[length] += 1
            rows.append(row)
    return rows


def _patterns(histogram: np.ndarray, capacity: int) -> list[tuple[tuple[int, ...], int]]:
    """Return (lengths in a row, number of such rows).

    A row starts with the longest length. It continues with two that fill it exactly, or else with the longest that fits.
    """
    stock = _Stock(histogram, capacity)
    patterns = []
    while length := stock.longest(capacity):
        row: list[int] = []
        free = capacity
        while length:
            pair = stock.pair(free) if row and length < free else ()
            for chosen in pair or (length,):
                stock.take(chosen)
                row.append(chosen)
                free -= chosen
            length = stock.longest(free)
        counts = Counter(row)
        repeats = min(stock.left[length] // count for length, count in counts.items())
        for length, count in counts.items():
            stock.take(length, count * repeats)
        patterns.append((tuple(row), 1 + repeats))
    return patterns


class _Stock:
    """Number of unpacked examples of each length.

    Bit l of ``available`` is set if an example of l tokens is left, and so is bit capacity − l of ``mirrored``. Shifting one
    against the other shows all pairs of lengths with a given sum.
    """

    def __init__(self, histogram: np.ndarray, capacity: int) -> None:
        self.left: list[int] = histogram.tolist()
        self.capacity = capacity
        lengths = [length for length in range(1, capacity + 1) if self.left[length]]
        self.available = sum(1 << length for length in lengths)
        self.mirrored = sum(1 << (capacity - length) for length in lengths)

    def take(self, length: int, count: int = 1) -> None:
        """Remove examples of a length."""
        self.left[length] -= count
        if not self.left[length]:
            self.available &= ~(1 << length)
            self.mirrored &= ~(1 << (self.capacity - length))

    def longest(self, free: int) -> int:
        """Return the longest length of at most ``free`` tokens; 0 if there is none."""
        return max(0, (self.available & ((2 << free) - 1)).bit_length() - 1)

    def pair(self, free: int) -> tuple[int, ...]:
        """Return two lengths whose sum is ``free``, the longer one as long as possible; empty if there are none."""
        pairs = self.available & ((1 << free) - 1) & (self.mirrored >> (self.capacity - free))
        longer = pairs.bit_length() - 1
        if longer < 0 or (2 * longer == free and self.left[longer] < 2):
            return ()
        return longer, free - longer
