"""Which examples of which source one epoch takes, and in which groups they are packed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

GROUP_EXAMPLES = 10_000
"""Shards are read and packed in groups of at least so many examples: enough for best fit to leave almost no padding."""

Mixing = Literal["concat", "first_exhausted", "all_exhausted"]


def mixture(sizes: Sequence[int], weights: Sequence[float], mixing: Mixing) -> list[int]:
    """How many examples of each source one epoch takes.

    Args:
        sizes: examples in each source.
        weights: relative shares of the mixture.
        mixing: ``concat`` takes each source whole; otherwise the takes are in the proportion of the weights, and the source that
            decides (the first, or the last, to be used up) is taken whole exactly once.

    >>> mixture([100, 1000], [1, 1], "first_exhausted"), mixture([100, 1000], [1, 3], "all_exhausted")
    ([100, 100], [333, 1000])
    """
    if mixing == "concat":
        return list(sizes)
    rounds = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    wanted = min(rounds) if mixing == "first_exhausted" else max(rounds)
    return [max(1, round(wanted * weight)) for weight in weights]


def order(shard_ends: np.ndarray, take: int, random: np.random.Generator | None) -> np.ndarray:
    """``take`` examples of a source, shard after shard; each example once before any comes twice.

    Where a part of the source is taken, it is a random sample of all its shards: files are often sorted.
    """
    starts = np.concatenate([[0], shard_ends[:-1]]).astype(np.int64)
    total = int(shard_ends[-1]) if len(shard_ends) else 0
    taken: list[np.ndarray] = []
    missing = take
    while missing > 0 and total:
        part = min(missing, total)
        chosen = np.arange(total) if part == total or random is None else np.sort(random.permutation(total)[:part])
        edges = np.searchsorted(chosen, [*starts, total])
        for shard in (random.permutation(len(shard_ends)) if random else np.arange(len(shard_ends))).tolist():
            examples = chosen[edges[shard] : edges[shard + 1]]
            taken.append((random.permutation(examples) if random else examples)[:missing])
            missing -= len(taken[-1])
            if missing == 0:
                break
    return np.concatenate(taken) if taken else np.empty(0, np.int64)


def groups(orders: Sequence[np.ndarray], random: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Groups of at least ``GROUP_EXAMPLES`` examples, each with its part of every source."""
    if random is None:
        orders = [np.concatenate(orders)]
    number = max(1, sum(map(len, orders)) // GROUP_EXAMPLES)
    for group in range(number):
        parts = [order[len(order) * group // number : len(order) * (group + 1) // number] for order in orders]
        whole = np.concatenate(parts)
        if len(whole):
            yield random.permutation(whole) if random else whole
