"""Find duplicate examples, within the training data and between training and evaluation. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PART = 1 << 22
"""Approximate number of examples compared at a time. Copies have the same hash, so hashes can be divided by value."""


@dataclass(frozen=True)
class Copies:
    """Which examples are copies, for all training sources in order, then all evaluation sets."""

    repeated: np.ndarray
    """[training + evaluation examples] bool: an earlier example of the same source or set is the same."""
    elsewhere: np.ndarray
    """[training examples] bool: the first of its source, but an example of an earlier source is the same."""
    evaluated: np.ndarray
    """[training examples] bool: an evaluation set also has it."""
    trained: np.ndarray
    """[evaluation examples] bool: a training source also has it."""

    @property
    def dropped(self) -> np.ndarray:
        """[training examples] bool: left out with ``data.duplicates: drop``."""
        return self.repeated[: len(self.elsewhere)] | self.elsewhere | self.evaluated


def find_copies(train: Sequence[np.ndarray], evaluation: Sequence[np.ndarray] = ()) -> Copies:
    """Compare all examples by their hashes.

    Args:
        train: for each training source [examples, 2] uint64 hashes.
        evaluation: the same for each evaluation set.
    """
    sizes = [len(each) for each in (*train, *evaluation)]
    digests = np.concatenate([np.empty((0, 2), np.uint64), *train, *evaluation])
    numbers = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    trained = sum(map(len, train))
    repeated, elsewhere, shared = (np.zeros(len(digests), bool) for _ in range(3))
    parts = np.uint64(-(-len(digests) // PART) or 1)
    for part in range(int(parts)):
        chosen = np.flatnonzero(digests[:, 0] % parts == part) if parts > 1 else np.arange(len(digests))
        if len(chosen):
            _compare(digests, numbers, trained, chosen, repeated, elsewhere, shared)
    return Copies(repeated, elsewhere[:trained], shared[:trained], shared[trained:])


def _compare(
    digests: np.ndarray,
    numbers: np.ndarray,
    trained: int,
    chosen: np.ndarray,
    repeated: np.ndarray,
    elsewhere: np.ndarray,
    shared: np.ndarray,
) -> None:
    """Compare some examples, which include all copies of each, and mark them.

    Args:
        digests: [examples, 2] uint64 hashes of all examples.
        numbers: [examples] number of the source or set.
        trained: number of training examples, which come first.
        chosen: indices of the examples to compare, ascending.
        repeated: receives True for copies within a source or set.
        elsewhere: receives True for copies of an example of an earlier training source.
        shared: receives True for examples that are both trained and evaluated on.
    """
    # Sorting is stable, so the examples in a group of copies stay in order.
    ordered = chosen[np.lexsort((digests[chosen, 1], digests[chosen, 0]))]
    values = digests[ordered]
    copies = np.concatenate([[False], (values[1:] == values[:-1]).all(axis=1)])  # of the one before
    same_source = np.concatenate([[False], numbers[ordered[1:]] == numbers[ordered[:-1]]])
    repeated[ordered[copies & same_source]] = True
    elsewhere[ordered[copies & ~same_source & (ordered < trained)]] = True
    starts = np.flatnonzero(~copies)
    ends = np.append(starts[1:], len(ordered))
    both = (ordered[starts] < trained) & (ordered[ends - 1] >= trained)
    shared[ordered[np.repeat(both, ends - starts)]] = True
