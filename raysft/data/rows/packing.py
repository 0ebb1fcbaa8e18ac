"""Put examples of different lengths into rows of one length with as little padding as possible."""

from __future__ import annotations

from collections import Counter

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Assign examples to rows by best fit, longest first, never splitting one.

    Works on the histogram of lengths (after Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination"): what
    makes one full row makes as many as there are examples of these lengths, so that the cost depends on the number of different
    lengths more than on that of examples. A row is finished with two examples that fill it exactly wherever there are two.

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
    """(lengths in a row, number of such rows): the longest first, then two that fill it exactly, else the longest that fits."""
    stock = _Stock(histogram, capacity)
    rows = []
    while length := stock.longest(capacity):
        row: list[int] = []
        room = capacity
        while length:
            pair = stock.pair(room) if row and length < room else ()
            for each in pair or (length,):
                stock.take(each)
                row.append(each)
                room -= each
            length = stock.longest(room)
        numbers = Counter(row)
        again = min(stock.left[length] // number for length, number in numbers.items())
        for length, number in numbers.items():
            stock.take(length, number * again)
        rows.append((tuple(row), 1 + again))
    return rows


class _Stock:
    """Examples that are left, by length.

    Bit l of ``there`` says that one of l tokens is left, and so does bit capacity − l of ``mirrored``: one shift shows all pairs
    of lengths with a wanted sum.
    """

    def __init__(self, histogram: np.ndarray, capacity: int) -> None:
        self.left: list[int] = histogram.tolist()
        self.capacity = capacity
        lengths = [length for length in range(1, capacity + 1) if self.left[length]]
        self.there = sum(1 << length for length in lengths)
        self.mirrored = sum(1 << (capacity - length) for length in lengths)

    def take(self, length: int, number: int = 1) -> None:
        """Take some of a length."""
        self.left[length] -= number
        if not self.left[length]:
            self.there &= ~(1 << length)
            self.mirrored &= ~(1 << (self.capacity - length))

    def longest(self, room: int) -> int:
        """The longest that fits; 0 where none does."""
        return max(0, (self.there & ((2 << room) - 1)).bit_length() - 1)

    def pair(self, room: int) -> tuple[int, ...]:
        """Two lengths that fill the room exactly, the longer one as long as can be; empty where there are none."""
        pairs = self.there & ((1 << room) - 1) & (self.mirrored >> (self.capacity - room))
        longer = pairs.bit_length() - 1
        if longer < 0 or (2 * longer == room and self.left[longer] < 2):
            return ()
        return longer, room - longer
