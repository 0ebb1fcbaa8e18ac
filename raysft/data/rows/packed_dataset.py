"""Rows for the workers: read groups of shards, pack, and hand each worker its part of each step, in a known order.

A Ray Data row is one worker's share of a few steps, in turn over the workers, so that the ordered split deals shares out like
cards and nobody can be a step ahead. Ray's order is not taken on trust: each row names itself, and the loop checks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa

from raysft.cluster.placement import TASK_CPUS
from raysft.data.rows.row_layouts import ranges
from raysft.data.rows.row_plan import Layout, Mixing, RowPlan, SourceLengths, plan_rows
from raysft.data.rows.splice import splice
from raysft.data.shards.manifest import Manifest, load_manifest
from raysft.data.sources.pickle_guard import read_table
from raysft.data.types import IGNORE_INDEX
from raysft.storage.path import StoragePath

SHARE_TOKENS = 1 << 18
"""Tokens in one worker's share of a few steps, about: few blocks at many workers, and little waiting for the first."""
WAITING_BYTES = 64 << 20
"""Rows that wait in memory for workers, about; more where there are many workers."""
SEGMENT_ROWS = 4096
"""Rows that one task reads and packs at most."""
OPEN_BYTES = 96 << 20
"""Decompressed shards that a task keeps for its next rows, about."""

Batch = dict[str, np.ndarray]
"""``row`` [rows] int64 number of the row (−1: a filler without labels); ``tokens`` [rows] int64 without padding; ``input_ids``,
``labels``, ``position_ids`` [rows, capacity] int32. With several sources also ``sources`` [rows, capacity] int32 number of each
token's source; with weighted examples ``weights`` [rows, capacity] float32 what each token counts in the loss."""


@dataclass(frozen=True)
class RowSlices:
    """Where the pieces of some rows stand; compact, since a task is sent thousands of them."""

    rows: np.ndarray
    """[rows] numbers of the rows, −1 for a filler."""
    counts: np.ndarray
    """[rows] pieces in each."""
    shards: np.ndarray
    """[pieces] index of the shard."""
    positions: np.ndarray
    """[pieces] position of the example in its shard."""
    starts: np.ndarray
    """[pieces] first token of the example that is taken."""
    stops: np.ndarray
    """[pieces] the token after the last that is taken."""
    sources: np.ndarray | None = None
    """[pieces] number of the source; None where there is but one."""
    weights: np.ndarray | None = None
    """[pieces] what each token counts; None where all count the same."""


@dataclass(frozen=True)
class PackedDataset:
    """Rows of one or several manifests under a row_plan. Cheap to pickle: it is computed again where it is used."""

    manifests: tuple[str, ...]
    """Where the manifests are, one for each source: paths or URIs."""
    capacity: int
    global_batch_size: int | None = None
    """Rows of a step; None: as many as suit the data. ``row_plan`` knows the number."""
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    layout: Layout = "packed"
    mixing: Mixing = "concat"
    mixing_weights: tuple[float, ...] = ()
    """Weights of the sources in the mixture. Default: all the same."""
    document_mask: bool = True
    shuffle: bool = True
    earlier: PackedDataset | None = None
    """What all epochs that it has are taken from, before the rest is taken from here: the data changed on the way."""

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> PackedDataset:
        """The rows that ``described`` tells of."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in described.items()
        }
        earlier = fields.pop("earlier", None)
        return cls(**fields, earlier=cls.from_dict(earlier) if earlier else None)

    def to_dict(self) -> dict[str, Any]:
        """All that decides the rows, as JSON."""
        # A row_plan needs the manifests, and those of a run that is done may be gone with the cache.
        return asdict(
            self if self.global_batch_size else replace(self, global_batch_size=self.row_plan.global_batch_size)
        )

    def has_same_epochs(self, other: PackedDataset) -> bool:
        """Whether an epoch holds the same rows here and there, wherever the same manifests lie."""

        def course(rows: PackedDataset) -> PackedDataset:
            names = tuple(StoragePath(path).parent.name for path in rows.manifests)
            return replace(rows, manifests=names, epochs=1, max_steps=None, earlier=None)

        return course(self) == course(other)

    @cached_property
    def _loaded(self) -> list[Manifest]:
        return [*(self.earlier._loaded if self.earlier else []), *self._own]

    @cached_property
    def _own(self) -> list[Manifest]:
        return [load_manifest(StoragePath(path)) for path in self.manifests]

    @cached_property
    def row_plan(self) -> RowPlan:
        """The order of all rows."""
        if self.earlier is None:
            return self._planned(self.max_steps)
        if self.earlier.epochs >= self.epochs:  # other data was to come, and then fewer epochs than would reach it
            return replace(self.earlier, epochs=self.epochs, max_steps=self.max_steps).row_plan
        known = self.earlier._loaded
        return splice(
            self.earlier.row_plan, self._planned(None), sum(map(len, known)), len(known), max_steps=self.max_steps
        )

    def _planned(self, max_steps: int | None) -> RowPlan:
        mixing_weights = self.mixing_weights or (1.0,) * len(self.manifests)
        return plan_rows(
            [
                SourceLengths(
                    manifest.lengths, manifest.loss_tokens, manifest.shard_ends(), mixing_weight, manifest.weights
                )
                for manifest, mixing_weight in zip(self._own, mixing_weights, strict=True)
            ],
            capacity=self.capacity,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epochs=self.epochs,
            max_steps=max_steps,
            layout=self.layout,
            mixing=self.mixing,
            document_mask=self.document_mask,
            shuffle=self.shuffle,
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their numbers."""
        return tuple(manifest.name for manifest in self._loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Read and lay out some rows; −1 gives a filler row, which has no labels."""
        return collate(self._places(rows), self._shards[0], self.capacity, self.document_mask)

    def steps(self, first: int, worker: int, workers: int) -> Iterator[Batch]:
        """One worker's rows of each step from ``first`` on, read here and now, without Ray."""
        for step in range(first, self.row_plan.steps):
            yield self.batch(self.rows_for_rank(step, worker, workers))

    def rows_for_rank(self, step: int, worker: int, workers: int) -> np.ndarray:
        """Numbers of the rows that a worker trains on in a step; −1 for a filler."""
        return rows_for_rank(self.row_plan.rows, self.row_plan.global_batch_size, step, worker, workers)

    def records(self, row: int) -> list[str]:
        """Where the examples of a row come from: ``source: file:line``."""
        places = self._places([row])
        found = []
        for shard, position in zip(places.shards.tolist(), places.positions.tolist(), strict=True):
            table = read_table(StoragePath(self._shards[0][shard]), ["source", "record"]).slice(position, 1).to_pylist()
            found.append(f"{table[0]['source']}: {table[0]['record']}")
        return found

    def batches(self, shares: Iterable[pa.Table], workers: int) -> Iterator[Batch]:
        """What a worker gets from its split of ``dataset`` → its rows of each step."""
        for table in shares:
            yield from as_batches(table, -(-self.row_plan.global_batch_size // workers))

    def dataset(self, first: int, workers: int) -> Any:
        """The same for all workers as a Ray dataset, to be split over them in order, from step ``first`` on."""
        import ray

        segments = [{"piece": segment} for segment in self._segments(first, workers)]
        context = ray.data.DataContext.get_current().copy()
        # One share is one block: with a target of a byte each yielded table of one row becomes a block by itself.
        context.target_max_block_size = 1
        context.execution_options = self.execution_options(workers)
        context.enable_progress_bars = False
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_items(segments, override_num_blocks=max(1, len(segments)))
            # A task for each core at most: each keeps a group of shards in memory.
            cpus = int(ray.cluster_resources().get("CPU", 1.0))
            tasks = ray.data.TaskPoolStrategy(size=max(1, min(cpus, len(segments))))
            return dataset.map_batches(cast(Any, _shares), batch_size=1, num_cpus=TASK_CPUS, compute=tasks)

    def execution_options(self, workers: int) -> Any:
        """How Ray Data is to run ``dataset``: in order, and not further ahead than a few shares for each worker."""
        import ray

        share_bytes = 20 * max(SHARE_TOKENS, self.row_plan.global_batch_size * self.capacity // workers)
        waiting = ray.data.ExecutionResources(object_store_memory=max(WAITING_BYTES, 4 * workers * share_bytes))
        return ray.data.ExecutionOptions(preserve_order=True, resource_limits=waiting)

    def _segments(self, first: int, workers: int) -> Iterator[dict[str, Any]]:
        """What each task makes: the shares of some steps that lie in about one group of shards."""
        row_plan, per_step = self.row_plan, self.row_plan.global_batch_size
        each = -(-per_step // workers)
        steps_in_share = max(1, SHARE_TOKENS // (each * self.capacity))
        longest = max(1, SEGMENT_ROWS // (per_step * steps_in_share)) * steps_in_share
        ends = np.unique(np.minimum(-(-row_plan.group_ends // per_step), row_plan.steps))
        start = first
        while start < row_plan.steps:
            group_end = int(ends[np.searchsorted(ends, start, side="right")]) if start < ends[-1] else row_plan.steps
            stop = min(group_end, start + longest)
            shares = []
            for at in range(start, stop, steps_in_share):
                steps = range(at, min(at + steps_in_share, stop))
                for worker in range(workers):
                    rows = [self.rows_for_rank(step, worker, workers) for step in steps]
                    shares.append(self._places(np.concatenate(rows)))
            yield {
                "shares": shares,
                "capacity": self.capacity,
                "paths": self._shards[0],
                "document_mask": self.document_mask,
            }
            start = stop

    def _places(self, rows: Sequence[int] | np.ndarray) -> RowSlices:
        """Where the pieces of some rows stand."""
        _, ends = self._shards
        firsts = np.concatenate([[0], ends[:-1]])
        row_plan, segments = self.row_plan, self.row_plan.segments
        offsets = segments.offsets
        ranges = [np.arange(offsets[row], offsets[row + 1]) if row >= 0 else np.empty(0, np.int64) for row in rows]
        chosen = np.concatenate(ranges) if ranges else np.empty(0, np.int64)
        examples = segments.examples[chosen]
        shards = np.searchsorted(ends, examples, side="right")
        return RowSlices(
            rows=np.asarray(rows, np.int64),
            counts=np.array([len(each) for each in ranges], np.int32),
            shards=shards.astype(np.int32),
            positions=(examples - firsts[shards]).astype(np.int32),
            starts=segments.starts[chosen].astype(np.int32),
            stops=segments.stops[chosen].astype(np.int32),
            sources=row_plan.sources[chosen] if len(self._loaded) > 1 else None,
            weights=None if row_plan.weights is None else row_plan.weights[examples],
        )

    @cached_property
    def _shards(self) -> tuple[list[str], np.ndarray]:
        """Paths of all shards, and the index of the example after each one's last."""
        paths: list[str] = []
        ends: list[np.ndarray] = []
        first = 0
        for manifest in self._loaded:
            paths.extend(place.location for place in manifest.shard_paths())
            ends.append(manifest.shard_ends() + first)
            first += len(manifest)
        return paths, np.concatenate(ends)


def rows_for_rank(rows: int, global_batch_size: int, step: int, worker: int, workers: int) -> np.ndarray:
    """Row numbers that a worker trains on in a step: step s has rows [s · R, (s + 1) · R); what is missing is −1.

    Every worker has the same number, R / workers rounded up.

    >>> [share(10, 4, 1, worker, 3).tolist() for worker in range(3)]
    [[4, 5], [6, 7], [-1, -1]]
    """
    each = -(-global_batch_size // workers)
    within = np.arange(worker * each, (worker + 1) * each)
    numbers = step * global_batch_size + within
    return np.where((within < global_batch_size) & (numbers < rows), numbers, -1)


def _shares(batch: dict[str, Any]) -> Iterator[pa.Table]:
    """Ray task: one table of one row for each share."""
    for segment in batch["piece"]:
        for places in segment["shares"]:
            made = collate(places, segment["paths"], segment["capacity"], segment["document_mask"])
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


def collate(places: RowSlices, paths: Sequence[str], capacity: int, document_mask: bool = True) -> Batch:
    """Lay pieces of examples side by side in rows.

    Positions start again at each piece, which keeps them apart, and once more where padding begins; without ``document_mask``
    a row's pieces are one text.
    """
    rows, lengths = len(places.rows), (places.stops - places.starts).astype(np.int64)
    row = np.repeat(np.arange(rows), places.counts)
    tokens = np.bincount(row, lengths, minlength=rows).astype(np.int64)
    before = np.cumsum(lengths) - lengths
    begins = row * capacity + before - (np.cumsum(tokens) - tokens)[row]  # where each piece begins, all rows in a line
    # From here on pieces stand in the order of their shards, so that each shard is looked at once.
    order = np.argsort(places.shards, kind="stable")
    begins, lengths = begins[order], lengths[order]
    inside = ranges(lengths)
    where = np.repeat(begins, lengths) + inside
    ids, labels = _tokens(places, order, paths, lengths, inside)
    # The first label of a piece, or of a row, has nothing that it sees before it to predict it from.
    firsts = np.cumsum(lengths) - lengths
    labels[firsts if document_mask else firsts[begins % capacity == 0]] = IGNORE_INDEX

    def laid(values: np.ndarray, empty: np.ndarray | int, kind: type) -> np.ndarray:
        whole = np.empty((rows, capacity), kind)
        whole[:] = empty
        whole.reshape(-1)[where] = values
        return whole

    padding = np.maximum(np.arange(capacity) - tokens[:, None], 0)
    batch: Batch = {
        "row": places.rows,
        "tokens": tokens,
        "input_ids": laid(ids, 0, np.int32),
        "labels": laid(labels, IGNORE_INDEX, np.int32),
        "position_ids": laid(inside if document_mask else where % capacity, padding, np.int32),
    }
    if places.sources is not None:
        batch["sources"] = laid(np.repeat(places.sources[order], lengths), 0, np.int32)
    if places.weights is not None:
        batch["weights"] = laid(np.repeat(places.weights[order], lengths), 0, np.float32)
    return batch


def _tokens(
    places: RowSlices, order: np.ndarray, paths: Sequence[str], lengths: np.ndarray, inside: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of all pieces, one after the other in the order of their shards."""
    ids, labels = np.empty((2, len(inside)), np.int32)
    shards, positions, starts = places.shards[order], places.positions[order], places.starts[order]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(shards)] if len(shards) else []
    for first, stop in pairwise(bounds):
        here = slice(ends[first], ends[stop])
        for values, (tokens, offsets) in zip((ids, labels), _shard(paths[int(shards[first])]), strict=True):
            begins = offsets[positions[first:stop]] + starts[first:stop]
            values[here] = tokens[np.repeat(begins, lengths[first:stop]) + inside[here]]
    return ids, labels


_open_shards: dict[str, tuple[Any, ...]] = {}


def _shard(path: str) -> tuple[Any, Any]:
    """(tokens, offsets) of a shard's ids and of its labels. The shards read last stay in memory: rows of a group draw from all."""
    if path not in _open_shards:
        while sum(values.nbytes for each in _open_shards.values() for pair in each for values in pair) > OPEN_BYTES:
            _open_shards.pop(next(iter(_open_shards)))
        table = read_table(StoragePath(path), ["input_ids", "labels"])
        columns = [table[name].combine_chunks() for name in ("input_ids", "labels")]
        _open_shards[path] = tuple((column.values.to_numpy(), column.offsets.to_numpy()) for column in columns)
    return _open_shards[path]
