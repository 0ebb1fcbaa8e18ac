"""Choose the examples that one epoch takes from each source, and the groups in which they are packed. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
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


def index_type(numbers: int) -> type[np.signedinteger]:
    """Return the integer type for this many numbers: half the memory where that suffices."""
    return np.int32 if numbers < 1 << 31 else np.int64


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
    starts = np.concatenate([[0], shard_ends[:-1]])
    total = int(shard_ends[-1]) if len(shard_ends) else 0
    ordered = np.empty(take if total else 0, index_type(total))
    done = 0
    while done < len(ordered):
        part = min(len(ordered) - done, total)
        chosen = np.arange(total, dtype=ordered.dtype)
        if part < total and random is not None:
            random.shuffle(chosen)
            chosen = np.sort(chosen[:part])
        edges = np.searchsorted(chosen, np.array([*starts, total], ordered.dtype))
        for shard in (random.permutation(len(shard_ends)) if random else np.arange(len(shard_ends))).tolist():
            examples = chosen[edges[shard] : edges[shard + 1]]
            if random:
                random.shuffle(examples)
            examples = examples[: len(ordered) - done]
            ordered[done : done + len(examples)] = examples
            done += len(examples)
            if done == len(ordered):
                break
    return ordered


def groups(orders: Sequence[np.ndarray], random: np.random.Generator | None) -> list[np.ndarray]:
    """Return groups of at least ``GROUP_EXAMPLES`` examples, each with its part of every source.

    Args:
        orders: the ordered examples of each source.
        random: source of the order within a group; None keeps the sources one after another.
    """
    if random is None:
        orders = [np.concatenate(orders)]
    total = sum(map(len, orders))
    grouped = np.empty(total, np.result_type(*orders))
    found, count, start = [], max(1, total // GROUP_EXAMPLES), 0
    for index in range(count):
        stop = start
        for order in orders:
            part = order[len(order) * index // count : len(order) * (index + 1) // count]
            grouped[stop : stop + len(part)] = part
            stop += len(part)
        if stop > start:
            found.append(grouped[start:stop])
            if random:
                random.shuffle(found[-1])
        start = stop
    return found
