"""Lay out the rows of each epoch: choose its examples, order them and put them into rows. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raysft.data.rows import mixture
from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.batch_size import MAX_AUTO_BATCH_SIZE
from raysft.data.rows.row_layouts import Layout, SegmentsBuilder


@dataclass(frozen=True)
class SourceLengths:
    """Lengths and weights of one source's examples."""

    lengths: np.ndarray
    """[examples] tokens."""
    loss_tokens: np.ndarray
    """[examples] tokens that the loss covers."""
    shard_ends: np.ndarray
    """[shards] index of the example after each shard's last."""
    weight: float = 1.0
    """Weight of the source in a mixture, relative to the others."""
    example_weights: np.ndarray | None = None
    """[examples] float32 weight of each example's tokens in the loss. Default: 1."""

    used: np.ndarray | None = None
    """Indices of the eligible examples, ascending. Default: all."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def usable(self) -> int:
        """Number of eligible examples."""
        return len(self) if self.used is None else len(self.used)

    def order(self, take: int, random: np.random.Generator | None) -> np.ndarray:
        """[take] indices of examples, in the order of ``mixture.order``."""
        if self.used is None:
            return mixture.order(self.shard_ends, take, random)
        return self.used[mixture.order(np.searchsorted(self.used, self.shard_ends), take, random)]


@dataclass(frozen=True)
class Epoch:
    """Where an epoch lies among the rows of all epochs."""

    start: int
    rows: int
    group_ends: np.ndarray
    """Rows of the epoch at which a group of shards ends."""


def lay_out_epochs(
    builder: SegmentsBuilder,
    sources: Sequence[SourceLengths],
    takes: Sequence[int],
    capacity: int,
    seed: int | None,
    epochs: int,
    layout: Layout,
    document_mask: bool,
) -> Iterator[Epoch]:
    """Add the rows of each epoch to the builder, one after another."""
    lengths = _joined([source.lengths for source in sources])
    loss_tokens = _joined([source.loss_tokens for source in sources])
    for number in range(epochs):
        random = None if seed is None else np.random.default_rng([seed, number])
        groups = mixture.groups(_orders(sources, takes, random), random)
        start = builder.rows
        if layout == "joined":
            for part in layouts.joined(np.concatenate(groups), lengths, capacity, document_mask):
                builder.append(part)
            tokens = np.cumsum([lengths[group].sum() for group in groups])
            ends = np.ceil(tokens / max(1, tokens[-1]) * (builder.rows - start)).astype(int)
        else:
            rows = []
            for group in groups:
                if layout == "packed":
                    part = layouts.packed(group, lengths, loss_tokens, capacity, random)
                else:
                    part = layouts.single(group, lengths, loss_tokens, capacity)
                builder.append(part)
                rows.append(len(part.offsets) - 1)
            ends = np.cumsum(rows)
        yield Epoch(start, builder.rows - start, ends)


def _orders(
    sources: Sequence[SourceLengths], takes: Sequence[int], random: np.random.Generator | None
) -> list[np.ndarray]:
    """The examples that an epoch takes from each source, in order, numbered over all sources."""
    examples, first, orders = sum(map(len, sources)), 0, []
    for source, take in zip(sources, takes, strict=True):
        order = source.order(take, random).astype(mixture.index_type(examples), copy=False)
        order += first
        orders.append(order)
        first += len(source)
    return orders


def _joined(values: Sequence[np.ndarray]) -> np.ndarray:
    """[examples of all sources] int32."""
    return values[0].astype(np.int32, copy=False) if len(values) == 1 else np.concatenate(values, dtype=np.int32)


def count_epochs(
    sources: Sequence[SourceLengths],
    takes: Sequence[int],
    capacity: int,
    layout: Layout,
    epochs: float,
    max_steps: int,
    global_batch_size: int | None,
) -> int:
    """Return the most epochs that a number of steps can need. The arguments are those of ``plan_rows``.

    An epoch has at least the rows that its tokens fill, or one for each example.
    """
    least = sum(_least(source, take, layout, capacity) for source, take in zip(sources, takes, strict=True))
    if global_batch_size is not None:
        return -(-max_steps // max(1, -(-least // global_batch_size)))
    # The number of rows in a step follows from ``epochs``.
    return max(math.ceil(epochs), -(-max_steps // max(1, -(-least // MAX_AUTO_BATCH_SIZE))))


def _least(source: SourceLengths, take: int, layout: Layout, capacity: int) -> int:
    """Return the fewest rows for a number of examples of a source, which may share the first and last row with other sources."""
    if layout == "single":
        return take
    lengths = source.lengths if source.used is None else source.lengths[source.used]
    passes, rest = divmod(take, max(1, len(lengths)))
    shortest = np.partition(lengths, rest)[:rest] if rest else lengths[:0]
    tokens = passes * int(lengths.sum(dtype=np.int64)) + int(shortest.sum(dtype=np.int64))
    return tokens // capacity


def epoch_steps(rows: int, global_batch_size: int) -> int:
    """Return the number of steps of an epoch; the last may be incomplete."""
    return -(-rows // global_batch_size)


def steps_at_end(epochs: float, steps: int) -> int:
    """Return the steps of the last of this many epochs, as in transformers: a fraction of its steps is rounded up.

    Args:
        epochs: all epochs; 2.5 ends in the middle of the third.
        steps: steps of the whole last epoch.

    >>> [steps_at_end(epochs, 7) for epochs in (1, 0.5, 2.5, 3)]
    [7, 4, 4, 7]
    """
    before = math.ceil(epochs) - 1
    return math.ceil(epochs * steps) - before * steps


def segment_index_type(
    sources: Sequence[SourceLengths], takes: Sequence[int], epochs: int, capacity: int
) -> type[np.signedinteger]:
    """The integer type that can number all segments: an example has one for each row that it touches."""
    segments = sum(map(len, sources))
    for source, take in zip(sources, takes, strict=True):
        passes = -(-take // max(1, source.usable))
        cuts = int(source.lengths.sum(dtype=np.int64)) // max(1, capacity - 1) + 1
        segments += epochs * (take + passes * cuts)
    return mixture.index_type(segments)
