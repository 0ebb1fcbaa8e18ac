"""Lay out the rows of each epoch: choose its examples, order them and put them into rows. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raysft.data.rows import mixture
from raysft.data.rows import row_layouts as layouts
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

    def __len__(self) -> int:
        return len(self.lengths)


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
    """Put the rows of each epoch into the builder, one after the other."""
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
        order = mixture.order(source.shard_ends, take, random).astype(mixture.index_type(examples), copy=False)
        order += first
        orders.append(order)
        first += len(source)
    return orders


def _joined(values: Sequence[np.ndarray]) -> np.ndarray:
    """[examples of all sources] int32."""
    return values[0].astype(np.int32, copy=False) if len(values) == 1 else np.concatenate(values, dtype=np.int32)


def segment_index_type(
    sources: Sequence[SourceLengths], takes: Sequence[int], epochs: int, capacity: int
) -> type[np.signedinteger]:
    """The integer type that can number all segments: an example has one for each row that it touches."""
    segments = sum(map(len, sources))
    for source, take in zip(sources, takes, strict=True):
        passes = -(-take // max(1, len(source)))
        cuts = int(source.lengths.sum(dtype=np.int64)) // max(1, capacity - 1) + 1
        segments += epochs * (take + passes * cuts)
    return mixture.index_type(segments)
