"""Packing: every example in exactly one row, no row too full, and no more rows than best fit needs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from raysft.data.rows import packing


def pack(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """The indices of each row's examples."""
    indices, offsets = packing.pack(lengths, capacity)
    assert offsets[0] == 0
    assert offsets[-1] == len(indices) == len(lengths)
    return [indices[first:stop] for first, stop in pairwise(offsets.tolist())]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """Number of rows that the textbook algorithm needs, one example at a time."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


def draw(shape: str, seed: int) -> tuple[np.ndarray, int]:
    random = np.random.default_rng(seed)
    count, capacity = int(random.integers(1, 400)), int(random.integers(8, 600))
    lengths = {
        "even": random.integers(1, capacity + 1, count),
        "short": np.minimum(capacity, 1 + random.exponential(capacity / 20, count)),
        "skewed": np.minimum(capacity, 1 + random.lognormal(np.log(capacity) / 2, 1, count)),
        "few different": random.choice(random.integers(1, capacity + 1, 3), count),
        "full rows": np.full(count, capacity),
        "just over half": np.full(count, capacity // 2 + 1),
    }[shape]
    return lengths.astype(np.int32), capacity


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", ["even", "short", "skewed", "few different", "full rows", "just over half"])
def test_each_example_is_in_one_row_and_there_are_no_more_rows_than_best_fit_needs(shape, seed):
    lengths, capacity = draw(shape, seed)
    rows = pack(lengths, capacity)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= capacity for row in rows)
    assert len(rows) <= best_fit_decreasing(lengths, capacity)


def test_the_same_lengths_pack_the_same_way():
    lengths, capacity = draw("skewed", 1)
    assert [row.tolist() for row in pack(lengths, capacity)] == [row.tolist() for row in pack(lengths.copy(), capacity)]


def test_examples_of_one_length_keep_their_order():
    rows = pack(np.array([4, 4, 4, 4, 4]), 8)
    assert sorted(np.concatenate([sorted(row) for row in rows]).tolist()) == [0, 1, 2, 3, 4]
    assert [index for row in sorted(rows, key=lambda row: row[0]) for index in row] == [0, 1, 2, 3, 4]


def test_no_examples_give_no_rows():
    assert pack(np.array([], np.int32), 8) == []


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 9, 4], "an example has 9 tokens, but a row holds only 8"),
        ([3, 0], "an example has 0 tokens, but a row needs at least 1"),
    ],
)
def test_what_no_row_can_hold_is_refused(lengths, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        pack(np.array(lengths), 8)
