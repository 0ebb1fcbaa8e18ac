"""Which example stands in which row and which row belongs to which step: exact, and known before anything starts.

Pure: (lengths, trained tokens, shards, weights, seed) → rows. Whoever computes it gets the same answer, so that a resumed run, a
worker and ``raysft check`` agree without talking to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysft.data import layout as layouts
from raysft.data import mix
from raysft.data.layout import Layout, Pieces
from raysft.data.mix import Mixing


@dataclass(frozen=True)
class Lengths:
    """What the schedule must know of one source."""

    lengths: np.ndarray
    """[examples] tokens."""
    trained: np.ndarray
    """[examples] trained tokens."""
    shard_ends: np.ndarray
    """[shards] index of the example after each shard's last."""
    weight: float = 1.0
    """Its share of a mixture, relative to the other sources'."""
    example_weights: np.ndarray | None = None
    """[examples] float32: what a trained token of each example counts in the loss. Default: 1."""

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Schedule:
    """The rows of a training or an evaluation, in order."""

    pieces: Pieces
    sources: np.ndarray
    """[pieces] number of the source."""
    weights: np.ndarray | None
    """[examples] what a trained token of each counts; None where all count the same."""
    capacity: int
    """Tokens that a row holds."""
    rows_per_step: int
    group_ends: np.ndarray
    """Row numbers at which a group of shards ends; reading in such pieces opens each shard once."""
    epoch_ends: np.ndarray
    """Row numbers at which an epoch ends."""

    @property
    def rows(self) -> int:
        """Rows over all epochs."""
        return len(self.pieces.offsets) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be incomplete."""
        return -(-self.rows // self.rows_per_step)

    def row(self, index: int) -> np.ndarray:
        """The examples of which a row holds pieces."""
        return self.pieces.examples[self.pieces.offsets[index] : self.pieces.offsets[index + 1]]

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """[steps] tokens without padding."""
        return self._per_step(self.pieces.stops - self.pieces.starts)

    @cached_property
    def step_trained(self) -> np.ndarray:
        """[steps] trained tokens."""
        return self._per_step(self.pieces.trained)

    @cached_property
    def step_squares(self) -> np.ndarray:
        """[steps] sum of the squares of the tokens of each piece: pairs of tokens that may see each other, twice."""
        return self._per_step((self.pieces.stops - self.pieces.starts).astype(np.int64) ** 2)

    @cached_property
    def step_weight(self) -> np.ndarray:
        """[steps] float64 weight of the trained tokens: what each step's loss is divided by. Their number, without weights."""
        return self.step_trained.astype(np.float64) if self.weights is None else self._per_step(self._weighted)

    def source_weight(self, step: int, sources: int) -> np.ndarray:
        """[sources] float64 weight of a step's trained tokens, of each source."""
        first, last = self.pieces.offsets[self._edges(step)], self.pieces.offsets[self._edges(step + 1)]
        return np.bincount(self.sources[first:last], self._weighted[first:last], minlength=sources)

    @property
    def useful(self) -> float:
        """Share of the row space that holds tokens."""
        return float(self.step_tokens.sum()) / max(1, self.rows * self.capacity)

    def epoch_of(self, rows: int) -> float:
        """How many epochs a number of consumed rows is."""
        epoch = int(np.searchsorted(self.epoch_ends, rows, side="left"))
        if epoch >= len(self.epoch_ends):
            return float(len(self.epoch_ends))
        start = self.epoch_ends[epoch - 1] if epoch else 0
        return float(epoch + (rows - start) / max(1, self.epoch_ends[epoch] - start))

    @cached_property
    def _weighted(self) -> np.ndarray:
        trained = self.pieces.trained.astype(np.float64)
        return trained if self.weights is None else trained * self.weights[self.pieces.examples]

    def _edges(self, steps: np.ndarray | int) -> np.ndarray:
        return np.minimum(np.asarray(steps) * self.rows_per_step, self.rows)

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0], np.cumsum(values, dtype=np.result_type(values, np.int64))])
        return np.diff(totals[self.pieces.offsets[self._edges(np.arange(self.steps + 1))]])


def plan_rows(
    sources: Sequence[Lengths],
    *,
    capacity: int,
    rows_per_step: int,
    seed: int = 0,
    epochs: int = 1,
    max_steps: int | None = None,
    layout: Layout = "packed",
    mixing: Mixing = "concat",
    document_mask: bool = True,
    shuffle: bool = True,
) -> Schedule:
    """Mix the sources, order their examples and lay them out in rows, epoch by epoch.

    Args:
        sources: lengths of each source's examples.
        capacity: tokens that a row holds.
        rows_per_step: rows of an optimizer step over all workers.
        seed: with the epoch's number it decides the order and, in a mixture, which examples are taken.
        epochs: times that the mixture is used. Epochs follow each other without a gap: only the last step is incomplete.
        max_steps: cut the schedule after so many steps.
        layout: how examples become rows. ``packed`` wants examples of at most ``capacity`` tokens; the others cut longer ones.
        mixing: ``concat``: each example once an epoch; otherwise sources are taken in the proportion of their weights, until the
            first one is used up or until each one was (others begin again).
        document_mask: whether examples of a ``joined`` row are kept apart; if not, an example's first token is predicted too.
        shuffle: whether the order is drawn from the seed; otherwise it is that of the sources.

    Returns:
        The schedule.
    """
    firsts = np.cumsum([0, *map(len, sources)])
    lengths = np.concatenate([source.lengths for source in sources]).astype(np.int64)
    trained = np.concatenate([source.trained for source in sources]).astype(np.int64)
    takes = mix.mixture([len(source) for source in sources], [source.weight for source in sources], mixing)
    parts: list[Pieces] = []
    group_ends: list[int] = []
    epoch_ends: list[int] = []
    rows = 0
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch]) if shuffle else None
        orders = [
            first + mix.order(source.shard_ends, take, random)
            for first, source, take in zip(firsts, sources, takes, strict=False)
        ]
        groups = list(mix.groups(orders, random))
        if layout == "joined":
            part = layouts.joined(np.concatenate(groups), lengths, capacity, document_mask)
            ends = np.cumsum([lengths[group].sum() for group in groups]) / max(1, lengths[np.concatenate(groups)].sum())
            group_ends += (rows + np.ceil(ends * (len(part.offsets) - 1))).astype(int).tolist()
            parts.append(part)
            rows += len(part.offsets) - 1
        else:
            for group in groups:
                part = (
                    layouts.packed(group, lengths, trained, capacity, random)
                    if layout == "packed"
                    else layouts.single(group, lengths, trained, capacity)
                )
                parts.append(part)
                rows += len(part.offsets) - 1
                group_ends.append(rows)
        epoch_ends.append(rows)
        if max_steps and rows >= max_steps * rows_per_step:
            break
    pieces = layouts.cut(layouts.chain(parts), max_steps * rows_per_step if max_steps else rows)
    return Schedule(
        pieces=pieces,
        sources=(np.searchsorted(firsts, pieces.examples, side="right") - 1).astype(np.int16),
        weights=_weights(sources),
        capacity=capacity,
        rows_per_step=rows_per_step,
        group_ends=np.asarray(group_ends),
        epoch_ends=np.asarray(epoch_ends),
    )


def _weights(sources: Sequence[Lengths]) -> np.ndarray | None:
    if all(source.example_weights is None for source in sources):
        return None
    plain = [np.ones(len(source), np.float32) for source in sources]
    return np.concatenate(
        [
            one if source.example_weights is None else source.example_weights
            for source, one in zip(sources, plain, strict=True)
        ]
    )
