"""Rows for the workers: read groups of shards, pack, and hand each worker its part of each step, in a known order.

A Ray Data row is one worker's share of a few steps, in turn over the workers, so that the ordered split deals shares out like
cards and nobody can be a step ahead. Ray's order is not taken on trust: each row names itself, and the loop checks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.manifest import Manifest, load
from raysft.data.schedule import Schedule, plan_rows
from raysft.data.shards import TASK_CPUS
from raysft.records import IGNORED

SHARE_TOKENS = 1 << 18
"""Tokens in one worker's share of a few steps, about: few blocks at many workers, and little waiting for the first."""
PIECE_ROWS = 4096
"""Rows that one task reads and packs at most."""

Batch = dict[str, np.ndarray]
"""``row`` [rows] int64 number of the row (−1: a filler without labels); ``tokens`` [rows] int64 without padding; ``input_ids``,
``labels``, ``position_ids`` [rows, capacity] int32."""


@dataclass(frozen=True)
class Places:
    """Where the examples of some rows stand; compact, since a task is sent thousands of them."""

    rows: np.ndarray
    """[rows] numbers of the rows, −1 for a filler."""
    counts: np.ndarray
    """[rows] examples in each."""
    shards: np.ndarray
    """[examples] index of the shard."""
    positions: np.ndarray
    """[examples] position in its shard."""


@dataclass(frozen=True)
class Rows:
    """Packed rows of one or several manifests under a schedule. Cheap to pickle: it is computed again where it is used."""

    manifests: tuple[str, ...]
    """Paths of the manifests, one for each source."""
    capacity: int
    rows_per_step: int
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    packing: bool = True
    shuffle: bool = True

    @cached_property
    def _loaded(self) -> list[Manifest]:
        return [load(Path(path)) for path in self.manifests]

    @cached_property
    def schedule(self) -> Schedule:
        """The order of all rows."""
        manifests = self._loaded
        firsts = np.cumsum([0, *(len(manifest) for manifest in manifests)])
        return plan_rows(
            np.concatenate([manifest.lengths for manifest in manifests]),
            np.concatenate([manifest.trained for manifest in manifests]),
            np.concatenate([manifest.shard_ends() + first for manifest, first in zip(manifests, firsts, strict=False)]),
            capacity=self.capacity,
            rows_per_step=self.rows_per_step,
            seed=self.seed,
            epochs=self.epochs,
            max_steps=self.max_steps,
            packing=self.packing,
            shuffle=self.shuffle,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Read and pack some rows; −1 gives a filler row, which has no labels."""
        return _assemble(self._places(rows), self._shards[0], self.capacity)

    def steps(self, first: int, worker: int, workers: int) -> Iterator[Batch]:
        """One worker's rows of each step from ``first`` on, read here and now, without Ray."""
        for step in range(first, self.schedule.steps):
            yield self.batch(self.share(step, worker, workers))

    def share(self, step: int, worker: int, workers: int) -> np.ndarray:
        """Numbers of the rows that a worker trains on in a step; −1 for a filler."""
        return share(self.schedule.rows, self.rows_per_step, step, worker, workers)

    def batches(self, shares: Iterable[pa.Table], workers: int) -> Iterator[Batch]:
        """What a worker gets from its split of ``dataset`` → its rows of each step."""
        for table in shares:
            yield from as_batches(table, -(-self.rows_per_step // workers))

    def dataset(self, first: int, workers: int) -> Any:
        """The same for all workers as a Ray dataset, to be split over them in order, from step ``first`` on."""
        import ray

        pieces = [{"piece": piece} for piece in self._pieces(first, workers)]
        context = ray.data.DataContext.get_current().copy()
        # One share is one block: with a target of a byte each yielded table of one row becomes a block by itself.
        context.target_max_block_size = 1
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_items(pieces, override_num_blocks=max(1, len(pieces)))
            return dataset.map_batches(cast(Any, _shares), batch_size=1, num_cpus=TASK_CPUS)

    def _pieces(self, first: int, workers: int) -> Iterator[dict[str, Any]]:
        """What each task makes: the shares of some steps that lie in about one group of shards."""
        schedule, per_step = self.schedule, self.rows_per_step
        each = -(-per_step // workers)
        steps_in_share = max(1, SHARE_TOKENS // (each * self.capacity))
        longest = max(1, PIECE_ROWS // (per_step * steps_in_share)) * steps_in_share
        ends = np.unique(np.minimum(-(-schedule.group_ends // per_step), schedule.steps))
        start = first
        while start < schedule.steps:
            group_end = int(ends[np.searchsorted(ends, start, side="right")]) if start < ends[-1] else schedule.steps
            stop = min(group_end, start + longest)
            shares = []
            for at in range(start, stop, steps_in_share):
                steps = range(at, min(at + steps_in_share, stop))
                for worker in range(workers):
                    rows = [self.share(step, worker, workers) for step in steps]
                    shares.append(self._places(np.concatenate(rows)))
            yield {"shares": shares, "capacity": self.capacity, "paths": self._shards[0]}
            start = stop

    def _places(self, rows: Sequence[int] | np.ndarray) -> Places:
        """Where the examples of some rows stand."""
        _, ends = self._shards
        starts = np.concatenate([[0], ends[:-1]])
        examples = [self.schedule.row(int(row)) if row >= 0 else np.empty(0, np.int64) for row in rows]
        whole = np.concatenate(examples) if examples else np.empty(0, np.int64)
        shards = np.searchsorted(ends, whole, side="right")
        return Places(
            rows=np.asarray(rows, np.int64),
            counts=np.array([len(row) for row in examples], np.int32),
            shards=shards.astype(np.int32),
            positions=(whole - starts[shards]).astype(np.int32),
        )

    @cached_property
    def _shards(self) -> tuple[list[str], np.ndarray]:
        """Paths of all shards, and the index of the example after each one's last."""
        paths: list[str] = []
        ends: list[np.ndarray] = []
        first = 0
        for manifest in self._loaded:
            paths.extend(manifest.shard_paths())
            ends.append(manifest.shard_ends() + first)
            first += len(manifest)
        return paths, np.concatenate(ends)


def share(rows: int, rows_per_step: int, step: int, worker: int, workers: int) -> np.ndarray:
    """Row numbers that a worker trains on in a step: step s has rows [s · R, (s + 1) · R); what is missing is −1.

    Every worker has the same number, R / workers rounded up.

    >>> [share(10, 4, 1, worker, 3).tolist() for worker in range(3)]
    [[4, 5], [6, 7], [-1, -1]]
    """
    each = -(-rows_per_step // workers)
    within = np.arange(worker * each, (worker + 1) * each)
    numbers = step * rows_per_step + within
    return np.where((within < rows_per_step) & (numbers < rows), numbers, -1)


def _shares(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """Ray task: one table of one row for each share."""
    for piece in batch["piece"]:
        for places in piece["shares"]:
            made = _assemble(places, piece["paths"], piece["capacity"])
            yield pa.table(
                {
                    name: pa.array([values.reshape(-1)], pa.list_(pa.from_numpy_dtype(values.dtype)))
                    for name, values in made.items()
                }
            )


def as_batches(table: pa.Table, rows_per_batch: int) -> Iterator[Batch]:
    """A share (table of one row) → its steps' batches of ``rows_per_batch`` rows each."""
    flat = {name: table[name].combine_chunks()[0].values.to_numpy(zero_copy_only=True) for name in table.column_names}
    rows = len(flat["row"])
    whole = {name: values if len(values) == rows else values.reshape(rows, -1) for name, values in flat.items()}
    for start in range(0, rows, rows_per_batch):
        yield {name: values[start : start + rows_per_batch] for name, values in whole.items()}


def _assemble(places: Places, paths: Sequence[str], capacity: int) -> Batch:
    """Lay examples side by side in rows. Positions start again at each example, and once more where padding begins."""
    rows = len(places.rows)
    batch: Batch = {
        "row": places.rows,
        "tokens": np.zeros(rows, np.int64),
        "input_ids": np.zeros((rows, capacity), np.int32),
        "labels": np.full((rows, capacity), IGNORED, np.int32),
        "position_ids": np.zeros((rows, capacity), np.int32),
    }
    where = iter(zip(places.shards.tolist(), places.positions.tolist(), strict=True))
    for index, count in enumerate(places.counts.tolist()):
        at = 0
        for shard, position in islice(where, count):
            ids, labels = _example(paths[shard], position)
            end = at + len(ids)
            batch["input_ids"][index, at:end] = ids
            batch["labels"][index, at:end] = labels
            batch["labels"][index, at] = IGNORED  # nothing in its own example comes before it to predict it from
            batch["position_ids"][index, at:end] = np.arange(len(ids))
            at = end
        batch["tokens"][index] = at
        batch["position_ids"][index, at:] = np.arange(capacity - at)
    return batch


_open_shards: dict[str, tuple[Any, ...]] = {}


def _example(shard: Any, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of one example. The shards read last stay in memory: rows of a group draw from all of its shards."""
    if shard not in _open_shards:
        while len(_open_shards) >= 32:
            _open_shards.pop(next(iter(_open_shards)))
        table = pq.read_table(shard, columns=["input_ids", "labels"], memory_map=True)
        _open_shards[shard] = tuple(table[name].combine_chunks() for name in ("input_ids", "labels"))
    ids, labels = _open_shards[shard]
    start, end = ids.offsets[position].as_py(), ids.offsets[position + 1].as_py()
    return ids.values.to_numpy()[start:end], labels.values.to_numpy()[start:end]
