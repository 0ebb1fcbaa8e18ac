"""Which example stands in which row and which row belongs to which step: exact, and known before anything starts.

Pure: (lengths, trained tokens, shards, seed) → rows. Whoever computes it gets the same answer, so that a resumed run, a worker
and ``raysft check`` agree without talking to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysft.data.pack import pack

GROUP_EXAMPLES = 10_000
"""Shards are read and packed in groups of at least so many examples: enough for best fit to leave almost no padding."""


@dataclass(frozen=True)
class Schedule:
    """The rows of a training or an evaluation, in order."""

    offsets: np.ndarray
    """[rows + 1] int64: row r holds ``examples[offsets[r]:offsets[r + 1]]``."""
    examples: np.ndarray
    """Indices of examples in the manifest's order."""
    lengths: np.ndarray
    """[examples of the manifest] tokens."""
    trained: np.ndarray
    """[examples of the manifest] trained tokens."""
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
        return len(self.offsets) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may be incomplete."""
        return -(-self.rows // self.rows_per_step)

    def row(self, index: int) -> np.ndarray:
        """The examples of a row."""
        return self.examples[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """[steps] tokens without padding."""
        return self._per_step(self.lengths)

    @cached_property
    def step_trained(self) -> np.ndarray:
        """[steps] trained tokens: what each step's loss is divided by."""
        return self._per_step(self.trained)

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

    def _per_step(self, values: np.ndarray) -> np.ndarray:
        totals = np.concatenate([[0], np.cumsum(values[self.examples], dtype=np.int64)])
        edges = np.minimum(np.arange(self.steps + 1) * self.rows_per_step, self.rows)
        return np.diff(totals[self.offsets[edges]])


def plan_rows(
    lengths: np.ndarray,
    trained: np.ndarray,
    shard_ends: np.ndarray,
    *,
    capacity: int,
    rows_per_step: int,
    seed: int = 0,
    epochs: int = 1,
    max_steps: int | None = None,
    packing: bool = True,
    shuffle: bool = True,
) -> Schedule:
    """Order shards, pack each group of them and order the rows, epoch by epoch.

    Args:
        lengths: [examples] tokens, in the manifest's order.
        trained: [examples] trained tokens.
        shard_ends: [shards] index of the example after each shard's last.
        capacity: tokens that a row holds.
        rows_per_step: rows of an optimizer step over all workers.
        seed: with the epoch's number it decides the order.
        epochs: times that every example is used. Epochs follow each other without a gap: only the last step is incomplete.
        max_steps: cut the schedule after so many steps.
        packing: whether a row may hold several examples.
        shuffle: whether the order is drawn from the seed; otherwise that of the manifest.

    Returns:
        The schedule.
    """
    starts = np.concatenate([[0], shard_ends[:-1]]).astype(np.int64)
    rows: list[np.ndarray] = []
    group_ends: list[int] = []
    epoch_ends: list[int] = []
    limit = max_steps * rows_per_step if max_steps else None
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(shard_ends)) if shuffle else np.arange(len(shard_ends))
        for group in _groups(order, shard_ends - starts):
            examples = np.concatenate([np.arange(starts[shard], shard_ends[shard]) for shard in group])
            if shuffle:
                examples = random.permutation(examples)
            packed = pack(lengths[examples], capacity) if packing else [np.array([i]) for i in range(len(examples))]
            row_order = random.permutation(len(packed)) if shuffle else _by_first_example(packed)
            rows.extend(examples[packed[index]] for index in row_order)
            group_ends.append(len(rows))
        epoch_ends.append(len(rows))
        if limit is not None and len(rows) >= limit:
            break
    rows = rows[:limit]
    return Schedule(
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64),
        examples=np.concatenate(rows) if rows else np.empty(0, np.int64),
        lengths=lengths,
        trained=trained,
        capacity=capacity,
        rows_per_step=rows_per_step,
        group_ends=np.asarray(group_ends),
        epoch_ends=np.asarray(epoch_ends),
    )


def _by_first_example(packed: list[np.ndarray]) -> list[int]:
    return sorted(range(len(packed)), key=lambda index: int(packed[index].min()))


def _groups(order: np.ndarray, sizes: np.ndarray) -> list[list[int]]:
    """Shards in order, gathered until each group has enough examples; a small rest joins the last group."""
    groups: list[list[int]] = [[]]
    size = 0
    for shard in order.tolist():
        if size >= GROUP_EXAMPLES:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += int(sizes[shard])
    if len(groups) > 1 and size < GROUP_EXAMPLES:
        groups[-2].extend(groups.pop())
    return [group for group in groups if group]
