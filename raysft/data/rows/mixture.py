"""Choose the examples that one epoch takes from each source, and the groups in which they are packed. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

GROUP_EXAMPLES = 10_000
"""Minimum number of examples in a group. Shards are read and packed in groups; this many examples leave almost no padding."""

Mixing = Literal["concat", "first_exhausted", "all_exhausted"]


def mixture(sizes: Sequence[int], weights: Sequence[float], mixing: Mixing) -> list[int]:
    """Return how many examples of each source one epoch takes.

    Args:
        sizes: examples in each source.
        weights: relative weights of the sources.
        mixing: ``concat`` takes every source as a whole. Otherwise the numbers are in proportion to the weights, and the source
            that runs out first, or last, is taken as a whole exactly once.

    >>> mixture([100, 1000], [1, 1], "first_exhausted"), mixture([100, 1000], [1, 3], "all_exhausted")
    ([100, 100], [333, 1000])
    """
    if mixing == "concat":
        return list(sizes)
    passes = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    scale = min(passes) if mixing == "first_exhausted" else max(passes)
    return [max(1, round(scale * weight)) for weight in weights]


def order(shard_ends: np.ndarray, take: int, random: np.random.Generator | None) -> np.ndarray:
    """Order ``take`` examples of a source, shard by shard; every example comes once before any comes twice.

    A part of a source is a random sample of all its shards, because files are often sorted.

    Args:
        shard_ends: [shards] index of the example after each shard's last.
        take: number of examples.
        random: source of the order; None keeps that of the data.

    Returns:
        [take] indices of examples.
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
    """Yield groups of at least ``GROUP_EXAMPLES`` examples, each with its part of every source.

    Args:
        orders: the ordered examples of each source.
        random: source of the order within a group; None keeps the sources one after the other.
    """
    if random is None:
        orders = [np.concatenate(orders)]
    count = max(1, sum(map(len, orders)) // GROUP_EXAMPLES)
    for index in range(count):
        parts = [order[len(order) * index // count : len(order) * (index + 1) // count] for order in orders]
        group = np.concatenate(parts)
        if len(group):
            yield random.permutation(group) if random else group
