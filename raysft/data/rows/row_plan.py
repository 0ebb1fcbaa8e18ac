"""Plan which example goes into which row, and which row into which step, before anything starts. Pure functions.

The plan is a function of lengths, loss tokens, shards, weights and a seed. A resumed run, a worker and ``raysft check`` compute
the same plan without communication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from raysft.data.rows import mixture
from raysft.data.rows import row_layouts as layouts
from raysft.data.rows.batch_size import auto_batch_size
from raysft.data.rows.epochs import (
    Epoch,
    SourceLengths,
    count_epochs,
    epoch_steps,
    lay_out_epochs,
    segment_index_type,
    steps_at_end,
)
from raysft.data.rows.mixture import Mixing
from raysft.data.rows.row_layouts import Layout, Segments, SegmentsBuilder
from raysft.errors import RequestError

MAX_PLANNED = 1 << 32
"""Most examples, counted once per epoch, that a plan may order before the start; it takes about 20 bytes for each."""
BLOCK = 1 << 20
"""Segments processed at a time where processing all of them at once would take too much memory."""
STEP_SUMS = ("step_rows", "step_tokens", "step_loss_tokens", "step_squares", "step_weight")
"""What a plan knows about each step. A stored plan keeps it, because computing it takes a pass over all segments."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of a training run or an evaluation, in order."""

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
    """Consumed rows at which an epoch ends, even where the plan ends earlier."""

    @property
    def rows(self) -> int:
        """Rows of all epochs, including the empty rows that complete the last step of each epoch but the last."""
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
        offsets = self.segments.offsets
        return _sums(lambda first, stop: np.diff(offsets[first : stop + 1]) > 0, self._step_edges)

    def consumed(self, steps: int) -> int:
        """Return the number of rows in the first steps, without empty ones."""
        return int(self.step_rows[:steps].sum())

    @cached_property
    def epoch_steps(self) -> np.ndarray:
        """[epochs] steps after which an epoch ends."""
        return np.cumsum(-(-np.diff(self.epoch_ends, prepend=0) // self.global_batch_size))

    def epochs_after(self, steps: int) -> float:
        """Convert a number of steps to epochs; within an epoch, each step counts the same."""
        epoch = int(np.searchsorted(self.epoch_steps, steps, side="left"))
        if epoch >= len(self.epoch_steps):
            return float(len(self.epoch_steps))
        start = int(self.epoch_steps[epoch - 1]) if epoch else 0
        return epoch + (steps - start) / (int(self.epoch_steps[epoch]) - start)

    @property
    def rows_of_epochs(self) -> list[int]:
        """Rows of each epoch, up to the end of the plan."""
        return np.diff(np.minimum([0, *self.epoch_ends], self.consumed(self.steps))).tolist()

    @cached_property
    def step_tokens(self) -> np.ndarray:
        """[steps] tokens without padding."""
        return _sums(self._lengths, self._segment_edges)

    def examples_after(self, steps: int) -> int:
        """Count the examples of the first steps, again in each epoch; one that spans several rows counts where it begins."""
        edge = int(self._segment_edges[steps])
        return sum(self._beginnings(first, min(first + BLOCK, edge)) for first in range(0, edge, BLOCK))

    def _beginnings(self, first: int, stop: int) -> int:
        """Count the segments that begin an example. After a row that holds only its first token, the next row repeats it."""
        before, segments = max(0, first - 1), self.segments
        begins, examples = segments.starts[before:stop] == 0, segments.examples[before:stop]
        repeats = begins[1:] & begins[:-1] & (segments.stops[before : stop - 1] == 1) & (examples[1:] == examples[:-1])
        return int(begins[first - before :].sum() - repeats.sum())

    @cached_property
    def examples(self) -> int:
        """Examples of the whole plan, as ``examples_after`` counts them."""
        return self.examples_after(self.steps)

    @cached_property
    def step_loss_tokens(self) -> np.ndarray:
        """[steps] tokens that the loss covers."""
        return _sums(lambda first, stop: self.segments.loss_tokens[first:stop], self._segment_edges)

    @cached_property
    def step_squares(self) -> np.ndarray:
        """[steps] sum of squared segment lengths: twice the number of token pairs that attention compares."""
        return _sums(lambda first, stop: self._lengths(first, stop) ** 2, self._segment_edges)

    @cached_property
    def step_weight(self) -> np.ndarray:
        """[steps] float64 denominator of the loss: the weight of a step's loss tokens; their number if no example has a weight."""
        if self.weights is None:
            return self.step_loss_tokens.astype(np.float64)
        return _sums(self._loss_weights, self._segment_edges)

    def source_weight(self, step: int, sources: int) -> np.ndarray:
        """[sources] float64 weight of a step's loss tokens, by source."""
        per_step = self.global_batch_size
        rows = np.minimum([step * per_step, (step + 1) * per_step], self.rows)
        first, stop = self.segments.offsets[rows].tolist()
        return np.bincount(self.sources[first:stop], self._loss_weights(first, stop), minlength=sources)

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

    def _lengths(self, first: int, stop: int) -> np.ndarray:
        """[segments] int64 tokens of some segments."""
        return self.segments.stops[first:stop].astype(np.int64) - self.segments.starts[first:stop]

    def _loss_weights(self, first: int, stop: int) -> np.ndarray:
        """[segments] float64 weight of the loss tokens of some segments."""
        loss_tokens = self.segments.loss_tokens[first:stop].astype(np.float64)
        return loss_tokens if self.weights is None else loss_tokens * self.weights[self.segments.examples[first:stop]]

    @property
    def _step_edges(self) -> np.ndarray:
        """[steps + 1] row at which each step begins, and the number of rows."""
        return np.minimum(np.arange(self.steps + 1) * self.global_batch_size, self.rows)

    @property
    def _segment_edges(self) -> np.ndarray:
        """[steps + 1] segment at which each step begins, and the number of segments."""
        return self.segments.offsets[self._step_edges]


def _sums(values: Callable[[int, int], np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Sum values between edges, as differences of a running total.

    Args:
        values: gives the values from one index up to another.
        edges: [sums + 1] indices, ascending.

    Returns:
        [sums] int64, or float64 if the values are.
    """
    total: Any = 0
    totals = [np.zeros(1, np.int64)]
    blocks = np.unique([*np.searchsorted(edges, np.arange(0, edges[-1], BLOCK)), len(edges) - 1]).tolist()
    for first, last in pairwise([0, *blocks]):
        between = edges[first + 1 : last + 1] - edges[first]
        block = values(int(edges[first]), int(edges[last]))
        running = np.cumsum(np.concatenate([[total], block]), dtype=np.result_type(block, np.int64))
        totals.append(running[between])
        total = running[-1]
    return np.diff(np.concatenate(totals))


def rows_for_rank(rows: int, global_batch_size: int, step: int, worker: int, workers: int) -> np.ndarray:
    """Return the numbers of the rows that a worker trains on in a step.

    Step s has the rows [s · B, (s + 1) · B), where B is ``global_batch_size``. Every worker gets B / workers numbers, rounded up;
    −1 pads workers that have fewer rows.

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
    epochs: float = 1,
    max_steps: int | None = None,
    repeat: bool = False,
    layout: Layout = "packed",
    mixing: Mixing = "concat",
    document_mask: bool = True,
    shuffle: bool = True,
) -> RowPlan:
    """Mix the sources, order their examples and lay them out in rows, epoch by epoch.

    Args:
        sources: lengths of each source's examples.
        capacity: tokens in a row.
        global_batch_size: rows in an optimizer step, over all workers; None: ``auto_batch_size`` of ``epochs``.
        seed: together with the epoch number, it decides the order and, in a mixture, which examples are taken.
        epochs: passes over the mixture. Each begins with a new step, so that the last step of each may be incomplete. A
            fraction ends the last one partway through.
        max_steps: cut the plan after this number of steps.
        repeat: continue with further epochs, regardless of ``epochs``, until there are ``max_steps``.
        layout: how examples become rows. ``packed`` needs examples of at most ``capacity`` tokens; the others cut longer ones.
        mixing: ``concat``: each example once per epoch; otherwise sources are taken in proportion to their weights, until the
            first one runs out or until all have (the others repeat).
        document_mask: keep the examples of a ``joined`` row apart; otherwise an example's first token is predicted too.
        shuffle: draw the order from the seed; otherwise keep that of the sources.

    Raises:
        RequestError: ``max_steps`` asks for more examples than a plan can hold.
    """
    takes = mixture.mixture([source.usable for source in sources], [source.weight for source in sources], mixing)
    endless, most = repeat and max_steps, math.ceil(epochs)
    if endless:
        most = count_epochs(sources, takes, capacity, layout, epochs, endless, global_batch_size)
    builder = SegmentsBuilder(segment_index_type(sources, takes, most, capacity))
    made = lay_out_epochs(builder, sources, takes, capacity, seed if shuffle else None, most, layout, document_mask)
    known: list[Epoch] = []
    if global_batch_size is None:
        configured = islice(made, math.ceil(epochs))
        global_batch_size = auto_batch_size(_loss_tokens(builder, configured, known), epochs)
    used: list[Epoch] = []
    ends = [0]
    for epoch in chain(known, made):
        used.append(epoch)
        ends.append(ends[-1] + epoch_steps(epoch.rows, global_batch_size))
        if max_steps and ends[-1] >= max_steps:
            break
        if endless:
            _refuse_too_many(endless, len(used) * sum(takes) * endless // ends[-1])
    starts, steps = [end * global_batch_size for end in ends[:-1]], ends[-1]
    if not endless and len(used) == math.ceil(epochs):
        steps = ends[-2] + steps_at_end(epochs, ends[-1] - ends[-2])
    rows = min(starts[-1] + used[-1].rows, min(steps, max_steps or steps) * global_batch_size)
    padding = np.diff([each.start - start for each, start in zip(used, starts, strict=True)], prepend=0)
    segments = layouts.insert_empty_rows(builder.build(), [each.start for each in used], (-padding).tolist())
    segments = layouts.slice_rows(segments, 0, rows)
    return RowPlan(
        segments=segments,
        sources=_sources_of(segments.examples, [len(source) for source in sources]),
        weights=_example_weights(sources),
        capacity=capacity,
        global_batch_size=global_batch_size,
        group_ends=np.concatenate([start + epoch.group_ends for epoch, start in zip(used, starts, strict=True)]),
        epoch_ends=np.cumsum([epoch.rows for epoch in used]),
    )


def _refuse_too_many(max_steps: int, planned: int) -> None:
    """Refuse ``max_steps`` if, as the first epochs show, it needs more examples than a plan can hold."""
    if planned > MAX_PLANNED:
        raise RequestError(
            f"train.max_steps={max_steps} needs {planned:,} examples, but a row plan holds at most {MAX_PLANNED:,}; lower it"
        )


def _loss_tokens(builder: SegmentsBuilder, made: Iterator[Epoch], known: list[Epoch]) -> Iterator[np.ndarray]:
    """Yield [rows] loss tokens of each epoch as it is made, and remember the epoch."""
    for epoch in made:
        known.append(epoch)
        yield builder.loss_tokens(epoch.start)


def _sources_of(examples: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[segments] int16 source number.

    Args:
        examples: [segments] index of the example, over all sources in order.
        sizes: examples in each source.
    """
    numbers, firsts = np.zeros(len(examples), np.int16), np.cumsum([0, *sizes])
    for start in range(0, len(examples) if len(sizes) > 1 else 0, BLOCK):
        block = slice(start, start + BLOCK)
        numbers[block] = np.searchsorted(firsts, examples[block], side="right") - 1
    return numbers


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
