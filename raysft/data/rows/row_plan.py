"""Which example stands in which row and which row belongs to which step: exact, and known before anything starts.

Pure: (lengths, trained tokens, shards, weights, seed) → rows. Whoever computes it gets the same answer, so that a resumed run, a
worker and ``raysft check`` agree without talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import tee

import numpy as np

from raysft.data.rows import mixture
from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.mixture import Mixing
from raysft.data.rows.row_layouts import Layout, Segments

MAX_AUTO_BATCH_SIZE = 32
"""Rows of a step where nobody says how many, and there is data enough."""
MIN_AUTO_STEPS = 100
"""Steps that a training should have at least: Adam moves a weight by no more than the learning rate in each of them."""


@dataclass(frozen=True)
class SourceLengths:
    """What the row_plan must know of one source."""

    lengths: np.ndarray
    """[examples] tokens."""
    loss_tokens: np.ndarray
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
class RowPlan:
    """The rows of a training or an evaluation, in order."""

    segments: Segments
    sources: np.ndarray
    """[pieces] number of the source."""
    weights: np.ndarray | None
    """[examples] what a trained token of each counts; None where all count the same."""
    capacity: int
    """Tokens that a row holds."""
    global_batch_size: int
    group_ends: np.ndarray
    """Row numbers at which a group of shards ends; reading in such pieces opens each shard once."""
    epoch_ends: np.ndarray
    """Rows consumed at which an epoch ends."""

    @property
    def rows(self) -> int:
        """Rows over all epochs, with the empty ones that fill the last step of each epoch but the last."""
        return len(self.segments.offsets) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be incomplete."""
        return -(-self.rows // self.global_batch_size)

    def row(self, index: int) -> np.ndarray:
        """The examples of which a row holds pieces."""
        return self.segments.examples[self.segments.offsets[index] : self.segments.offsets[index + 1]]

    @cached_property
    def step_rows(self) -> np.ndarray:
        """[steps] rows that hold something."""
        filled = np.concatenate([[0], np.cumsum(np.diff(self.segments.offsets) > 0)])
        return np.diff(filled[self._edges(np.arange(self.steps + 1))])

    def consumed(self, steps: int) -> int:
        """Rows that hold something in the first steps."""
        return int(self.step_rows[:steps].sum())

    @property
    def rows_of_epochs(self) -> list[int]:
        """Rows of each epoch, as far as the row_plan goes."""
        return np.diff(np.minimum([0, *self.epoch_ends], self.consumed(self.steps))).tolist()

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """[steps] tokens without padding."""
        return self._per_step(self.segments.stops - self.segments.starts)

    @cached_property
    def step_loss_tokens(self) -> np.ndarray:
        """[steps] trained tokens."""
        return self._per_step(self.segments.loss_tokens)

    @cached_property
    def step_squares(self) -> np.ndarray:
        """[steps] sum of the squares of the tokens of each piece: pairs of tokens that may see each other, twice."""
        return self._per_step((self.segments.stops - self.segments.starts).astype(np.int64) ** 2)

    @cached_property
    def step_weight(self) -> np.ndarray:
        """[steps] float64 weight of the trained tokens: what each step's loss is divided by. Their number, without weights."""
        return self.step_loss_tokens.astype(np.float64) if self.weights is None else self._per_step(self._weighted)

    def source_weight(self, step: int, sources: int) -> np.ndarray:
        """[sources] float64 weight of a step's trained tokens, of each source."""
        first, last = self.segments.offsets[self._edges(step)], self.segments.offsets[self._edges(step + 1)]
        return np.bincount(self.sources[first:last], self._weighted[first:last], minlength=sources)

    @property
    def packing_efficiency(self) -> float:
        """Share of the row space that holds tokens."""
        return float(self.step_tokens.sum()) / max(1, self.consumed(self.steps) * self.capacity)

    def epoch_of(self, rows: int) -> float:
        """How many epochs a number of consumed rows is."""
        epoch = int(np.searchsorted(self.epoch_ends, rows, side="left"))
        if epoch >= len(self.epoch_ends):
            return float(len(self.epoch_ends))
        start = self.epoch_ends[epoch - 1] if epoch else 0
        return float(epoch + (rows - start) / max(1, self.epoch_ends[epoch] - start))

    @cached_property
    def _weighted(self) -> np.ndarray:
        loss_tokens = self.segments.loss_tokens.astype(np.float64)
        return loss_tokens if self.weights is None else loss_tokens * self.weights[self.segments.examples]

    def _edges(self, steps: np.ndarray | int) -> np.ndarray:
        return np.minimum(np.asarray(steps) * self.global_batch_size, self.rows)

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0], np.cumsum(values, dtype=np.result_type(values, np.int64))])
        return np.diff(totals[self.segments.offsets[self._edges(np.arange(self.steps + 1))]])


def auto_batch_size(epochs: Iterable[np.ndarray]) -> int:
    """How many rows a step has where nobody says: 32 where that gives at least 100 steps in all, else fewer.

    It is a power of two, which the usual numbers of workers divide, and no larger than an epoch needs. It is raised as far as
    it must be for each step to have something to learn from. Of a large data set only the beginning is looked at.

    Args:
        epochs: [rows] trained tokens of each row, epoch by epoch.

    >>> [step_size([np.ones(rows)] * epochs) for rows, epochs in ((3169, 1), (3168, 1), (500, 3), (40, 1), (5, 200))]
    [32, 16, 8, 1, 8]
    >>> step_size([np.array([4, 0, 7, 0, 0, 9])])
    2
    """
    known: list[np.ndarray] = []
    total = 0
    for epoch in epochs:
        known.append(epoch)
        total += len(epoch)
        if -(-total // MAX_AUTO_BATCH_SIZE) >= MIN_AUTO_STEPS:
            break
    shortest = min(map(len, known))
    size = MAX_AUTO_BATCH_SIZE
    while size > 1 and (-(-total // size) < MIN_AUTO_STEPS or size >= 2 * shortest):
        size //= 2
    while size < MAX_AUTO_BATCH_SIZE and not all(_each_step_learns(epoch, size) for epoch in known):
        size *= 2
    return size


def _each_step_learns(loss_tokens: np.ndarray, size: int) -> bool:
    return bool(np.add.reduceat(loss_tokens, np.arange(0, len(loss_tokens), size)).all())


def plan_rows(
    sources: Sequence[SourceLengths],
    *,
    capacity: int,
    global_batch_size: int | None = None,
    seed: int = 0,
    epochs: int = 1,
    max_steps: int | None = None,
    layout: Layout = "packed",
    mixing: Mixing = "concat",
    document_mask: bool = True,
    shuffle: bool = True,
) -> RowPlan:
    """Mix the sources, order their examples and lay them out in rows, epoch by epoch.

    Args:
        sources: lengths of each source's examples.
        capacity: tokens that a row holds.
        global_batch_size: rows of an optimizer step over all workers; None: what ``step_size`` says of all epochs.
        seed: with the epoch's number it decides the order and, in a mixture, which examples are taken.
        epochs: times that the mixture is used. Each begins with a step of its own, so that the last step of each may be
            incomplete.
        max_steps: cut the row_plan after so many steps.
        layout: how examples become rows. ``packed`` wants examples of at most ``capacity`` tokens; the others cut longer ones.
        mixing: ``concat``: each example once an epoch; otherwise sources are taken in the proportion of their weights, until the
            first one is used up or until each one was (others begin again).
        document_mask: whether examples of a ``joined`` row are kept apart; if not, an example's first token is predicted too.
        shuffle: whether the order is drawn from the seed; otherwise it is that of the sources.

    Returns:
        The row_plan.
    """
    firsts = np.cumsum([0, *map(len, sources)])
    laid = _epochs(sources, firsts, capacity, seed if shuffle else None, epochs, layout, mixing, document_mask)
    if global_batch_size is None:
        laid, seen = tee(laid)
        global_batch_size = auto_batch_size(
            np.concatenate([_row_loss_tokens(part) for part in parts]) for parts, _ in seen
        )
        del seen  # it would keep all that follows
    all_parts: list[Segments] = []
    group_ends: list[int] = []
    in_epochs: list[int] = []
    rows = 0
    for parts, ends in laid:
        start = -(-rows // global_batch_size) * global_batch_size
        all_parts += [layouts.empty(start - rows), *parts]
        group_ends += [start + end for end in ends]
        in_epochs.append(ends[-1])
        rows = start + ends[-1]
        if max_steps and rows > (max_steps - 1) * global_batch_size:
            break
    segments = layouts.cut(layouts.chain(all_parts), max_steps * global_batch_size if max_steps else rows)
    return RowPlan(
        segments=segments,
        sources=(np.searchsorted(firsts, segments.examples, side="right") - 1).astype(np.int16),
        weights=_weights(sources),
        capacity=capacity,
        global_batch_size=global_batch_size,
        group_ends=np.asarray(group_ends),
        epoch_ends=np.cumsum(in_epochs),
    )


def _epochs(
    sources: Sequence[SourceLengths],
    firsts: np.ndarray,
    capacity: int,
    seed: int | None,
    epochs: int,
    layout: Layout,
    mixing: Mixing,
    document_mask: bool,
) -> Iterator[tuple[list[Segments], list[int]]]:
    """The rows of one epoch after the other, in parts, and the rows of each epoch at which a group of shards ends."""
    lengths = np.concatenate([source.lengths for source in sources]).astype(np.int64)
    loss_tokens = np.concatenate([source.loss_tokens for source in sources]).astype(np.int64)
    takes = mixture.mixture([len(source) for source in sources], [source.weight for source in sources], mixing)
    for epoch in range(epochs):
        random = None if seed is None else np.random.default_rng([seed, epoch])
        orders = [
            first + mixture.order(source.shard_ends, take, random)
            for first, source, take in zip(firsts, sources, takes, strict=False)
        ]
        groups = list(mixture.groups(orders, random))
        if layout == "joined":
            part = layouts.joined(np.concatenate(groups), lengths, capacity, document_mask)
            ends = np.cumsum([lengths[group].sum() for group in groups]) / max(1, lengths[np.concatenate(groups)].sum())
            yield [part], np.ceil(ends * (len(part.offsets) - 1)).astype(int).tolist()
            continue
        parts = [
            layouts.packed(group, lengths, loss_tokens, capacity, random)
            if layout == "packed"
            else layouts.single(group, lengths, loss_tokens, capacity)
            for group in groups
        ]
        yield parts, np.cumsum([len(part.offsets) - 1 for part in parts]).tolist()


def _row_loss_tokens(part: Segments) -> np.ndarray:
    """[rows] trained tokens."""
    return np.add.reduceat(part.loss_tokens, part.offsets[:-1])


def _weights(sources: Sequence[SourceLengths]) -> np.ndarray | None:
    if all(source.example_weights is None for source in sources):
        return None
    plain = [np.ones(len(source), np.float32) for source in sources]
    return np.concatenate(
        [
            one if source.example_weights is None else source.example_weights
            for source, one in zip(sources, plain, strict=True)
        ]
    )
