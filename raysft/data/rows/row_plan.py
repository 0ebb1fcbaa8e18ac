"""Plan which example goes into which row, and which row into which step, before anything starts. Pure.

The plan is a function of lengths, loss tokens, shards, weights and a seed. A resumed run, a worker and ``raysft check`` compute
the same plan without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import tee

import numpy as np

from raysft.data.rows import mixture
from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.batch_size import auto_batch_size
from raysft.data.rows.mixture import Mixing
from raysft.data.rows.row_layouts import Layout, Segments


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
class RowPlan:
    """The rows of a training or an evaluation, in order."""

    segments: Segments
    sources: np.ndarray
    """[segments] number of the source."""
    weights: np.ndarray | None
    """[examples] weight of each example's tokens in the loss; None if all are 1."""
    capacity: int
    """Tokens in a row."""
    global_batch_size: int
    """Rows in a step, over all workers."""
    group_ends: np.ndarray
    """Rows at which a group of shards ends. Reading group by group opens each shard once."""
    epoch_ends: np.ndarray
    """Consumed rows at which an epoch ends."""

    @property
    def rows(self) -> int:
        """Rows of all epochs, with the empty rows that complete the last step of each epoch but the last."""
        return len(self.segments.offsets) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps. The last one may be incomplete."""
        return -(-self.rows // self.global_batch_size)

    def row(self, index: int) -> np.ndarray:
        """Return the examples that have a segment in a row."""
        return self.segments.examples[self.segments.offsets[index] : self.segments.offsets[index + 1]]

    @cached_property
    def step_rows(self) -> np.ndarray:
        """[steps] rows that are not empty."""
        filled = np.concatenate([[0], np.cumsum(np.diff(self.segments.offsets) > 0)])
        return np.diff(filled[self._step_edges(np.arange(self.steps + 1))])

    def consumed(self, steps: int) -> int:
        """Return the rows, without empty ones, of the first steps."""
        return int(self.step_rows[:steps].sum())

    @property
    def rows_of_epochs(self) -> list[int]:
        """Rows of each epoch, up to the end of the plan."""
        return np.diff(np.minimum([0, *self.epoch_ends], self.consumed(self.steps))).tolist()

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """[steps] tokens without padding."""
        return self._per_step(self.segments.stops - self.segments.starts)

    @cached_property
    def step_loss_tokens(self) -> np.ndarray:
        """[steps] tokens that the loss covers."""
        return self._per_step(self.segments.loss_tokens)

    @cached_property
    def step_squares(self) -> np.ndarray:
        """[steps] sum of squared segment lengths: twice the number of token pairs that attention compares."""
        return self._per_step((self.segments.stops - self.segments.starts).astype(np.int64) ** 2)

    @cached_property
    def step_weight(self) -> np.ndarray:
        """[steps] float64 denominator of the loss: the weight of a step's loss tokens; their number if no example has a weight."""
        return self.step_loss_tokens.astype(np.float64) if self.weights is None else self._per_step(self._loss_weights)

    def source_weight(self, step: int, sources: int) -> np.ndarray:
        """[sources] float64 weight of a step's loss tokens, by source."""
        first, last = self.segments.offsets[self._step_edges(step)], self.segments.offsets[self._step_edges(step + 1)]
        return np.bincount(self.sources[first:last], self._loss_weights[first:last], minlength=sources)

    @property
    def packing_efficiency(self) -> float:
        """Fraction of the rows' capacity that holds tokens."""
        return float(self.step_tokens.sum()) / max(1, self.consumed(self.steps) * self.capacity)

    def epoch_of(self, rows: int) -> float:
        """Convert a number of consumed rows to epochs."""
        epoch = int(np.searchsorted(self.epoch_ends, rows, side="left"))
        if epoch >= len(self.epoch_ends):
            return float(len(self.epoch_ends))
        start = self.epoch_ends[epoch - 1] if epoch else 0
        return float(epoch + (rows - start) / max(1, self.epoch_ends[epoch] - start))

    @cached_property
    def _loss_weights(self) -> np.ndarray:
        """[segments] float64 weight of a segment's loss tokens."""
        loss_tokens = self.segments.loss_tokens.astype(np.float64)
        return loss_tokens if self.weights is None else loss_tokens * self.weights[self.segments.examples]

    def _step_edges(self, steps: np.ndarray | int) -> np.ndarray:
        """Row at which each step begins."""
        return np.minimum(np.asarray(steps) * self.global_batch_size, self.rows)

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        """[steps] sum of a value over the segments of each step."""
        totals = np.concatenate([[0], np.cumsum(values, dtype=np.result_type(values, np.int64))])
        return np.diff(totals[self.segments.offsets[self._step_edges(np.arange(self.steps + 1))]])


def rows_for_rank(rows: int, global_batch_size: int, step: int, worker: int, workers: int) -> np.ndarray:
    """Return the numbers of the rows that a worker trains on in a step.

    Step s has the rows [s · B, (s + 1) · B), where B is ``global_batch_size``. Every worker gets B / workers numbers, rounded up;
    −1 stands for a row that does not exist.

    >>> [rows_for_rank(10, 4, 1, worker, 3).tolist() for worker in range(3)]
    [[4, 5], [6, 7], [-1, -1]]
    """
    per_worker = -(-global_batch_size // workers)
    within = np.arange(worker * per_worker, (worker + 1) * per_worker)
    numbers = step * global_batch_size + within
    return np.where((within < global_batch_size) & (numbers < rows), numbers, -1)


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
        capacity: tokens in a row.
        global_batch_size: rows in an optimizer step, over all workers; None: ``auto_batch_size`` of all epochs.
        seed: with the number of the epoch it decides the order and, in a mixture, which examples are taken.
        epochs: passes over the mixture. Each begins with a new step, so that the last step of each may be incomplete.
        max_steps: cut the plan after this number of steps.
        layout: how examples become rows. ``packed`` needs examples of at most ``capacity`` tokens; the others cut longer ones.
        mixing: ``concat``: each example once an epoch; otherwise sources are taken in proportion to their weights, until the
            first one runs out or until all have (the others repeat).
        document_mask: keep the examples of a ``joined`` row apart; otherwise an example's first token is predicted too.
        shuffle: draw the order from the seed; otherwise keep that of the sources.
    """
    firsts = np.cumsum([0, *map(len, sources)])
    planned = _epochs(sources, firsts, capacity, seed if shuffle else None, epochs, layout, mixing, document_mask)
    if global_batch_size is None:
        planned, peeked = tee(planned)
        global_batch_size = auto_batch_size(
            np.concatenate([_row_loss_tokens(part) for part in parts]) for parts, _ in peeked
        )
        del peeked  # tee would keep every epoch for it
    all_parts: list[Segments] = []
    group_ends: list[int] = []
    rows_of_epochs: list[int] = []
    rows = 0
    for parts, ends in planned:
        start = -(-rows // global_batch_size) * global_batch_size
        all_parts += [layouts.empty_rows(start - rows), *parts]
        group_ends += [start + end for end in ends]
        rows_of_epochs.append(ends[-1])
        rows = start + ends[-1]
        if max_steps and rows > (max_steps - 1) * global_batch_size:
            break
    segments = layouts.concatenate(all_parts)
    segments = layouts.slice_rows(segments, 0, max_steps * global_batch_size if max_steps else rows)
    return RowPlan(
        segments=segments,
        sources=(np.searchsorted(firsts, segments.examples, side="right") - 1).astype(np.int16),
        weights=_example_weights(sources),
        capacity=capacity,
        global_batch_size=global_batch_size,
        group_ends=np.asarray(group_ends),
        epoch_ends=np.cumsum(rows_of_epochs),
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
    """Yield the rows of each epoch, in parts, and the rows of that epoch at which a group of shards ends."""
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
    """[rows] tokens that the loss covers."""
    return np.add.reduceat(part.loss_tokens, part.offsets[:-1])


def _example_weights(sources: Sequence[SourceLengths]) -> np.ndarray | None:
    """[examples] float32 over all sources; None if no source has weights."""
    if all(source.example_weights is None for source in sources):
        return None
    return np.concatenate(
        [
            np.ones(len(source), np.float32) if source.example_weights is None else source.example_weights
            for source in sources
        ]
    )
