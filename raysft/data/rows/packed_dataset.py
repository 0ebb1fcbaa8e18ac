"""Packed rows of tokenized examples, in a known order, for any number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from raysft.data.rows import ray_stream
from raysft.data.rows.collate import Batch, RowSlices, collate
from raysft.data.rows.row_plan import Layout, Mixing, RowPlan, SourceLengths, plan_rows, rows_for_rank
from raysft.data.rows.splice import splice
from raysft.data.shards.manifest import Manifest, load_manifest
from raysft.data.sources.pickle_guard import read_table
from raysft.storage.path import StoragePath


@dataclass(frozen=True)
class PackedDataset:
    """The rows of one or several sources under a row plan.

    Cheap to pickle: the plan is computed again where it is used.
    """

    manifests: tuple[str, ...]
    """Paths or URIs of the manifests, one for each source."""
    capacity: int
    """Tokens in a row."""
    global_batch_size: int | None = None
    """Rows in a step; None: ``row_plan`` chooses the number."""
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
    """Rows of the first epochs, if the data changed on the way. All of its epochs come first; then those of this dataset with a
    higher number."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackedDataset:
        """Build a dataset from the result of ``to_dict``."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        earlier = fields.pop("earlier", None)
        return cls(**fields, earlier=cls.from_dict(earlier) if earlier else None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that decides the rows, as JSON."""
        # Choosing the batch size needs the manifests, and those of a finished run may be gone with the cache.
        chosen = self if self.global_batch_size else replace(self, global_batch_size=self.row_plan.global_batch_size)
        return asdict(chosen)

    def content(self) -> dict[str, Any]:
        """Return everything that decides the rows and their tokens, as JSON, wherever the manifests are stored.

        Shards have unique names, so a set that was written again, perhaps in another order, has another content.
        """
        manifests = [[manifest.key, *manifest.shards] for manifest in self._own_manifests]
        return {**self.to_dict(), "manifests": manifests, "earlier": self.earlier and self.earlier.content()}

    def has_same_epochs(self, other: PackedDataset) -> bool:
        """Return True if an epoch has the same rows in both, wherever the manifests are stored."""

        def epoch(dataset: PackedDataset) -> PackedDataset:
            names = tuple(StoragePath(path).parent.name for path in dataset.manifests)
            return replace(dataset, manifests=names, epochs=1, max_steps=None, earlier=None)

        return epoch(self) == epoch(other)

    @cached_property
    def row_plan(self) -> RowPlan:
        """The order of all rows."""
        if self.earlier is None:
            return self._plan(self.max_steps)
        if self.earlier.epochs >= self.epochs:  # the training ends before the data changes
            return replace(self.earlier, epochs=self.epochs, max_steps=self.max_steps).row_plan
        known = self.earlier._manifests
        examples = sum(map(len, known))
        return splice(self.earlier.row_plan, self._plan(None), examples, len(known), max_steps=self.max_steps)

    def _plan(self, max_steps: int | None) -> RowPlan:
        weights = self.mixing_weights or (1.0,) * len(self.manifests)
        return plan_rows(
            [
                SourceLengths(manifest.lengths, manifest.loss_tokens, manifest.shard_ends(), weight, manifest.weights)
                for manifest, weight in zip(self._own_manifests, weights, strict=True)
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
        return tuple(manifest.name for manifest in self._manifests)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Read and pack rows, given their numbers; −1 gives a filler row without labels."""
        return collate(self._find_slices(rows), self._shards[0], self.capacity, self.document_mask)

    def steps(self, first: int, worker: int, workers: int) -> Iterator[Batch]:
        """Yield a worker's rows of each step from ``first`` on, read in this process without Ray."""
        for step in range(first, self.row_plan.steps):
            yield self.batch(self.rows_for_rank(step, worker, workers))

    def rows_for_rank(self, step: int, worker: int, workers: int) -> np.ndarray:
        """Return the numbers of the rows that a worker trains on in a step; −1 for a filler."""
        return rows_for_rank(self.row_plan.rows, self.row_plan.global_batch_size, step, worker, workers)

    def records(self, row: int) -> list[str]:
        """Return the origin of the examples in a row, as ``source: file:line``."""
        slices = self._find_slices([row])
        records = []
        for shard, position in zip(slices.shards.tolist(), slices.positions.tolist(), strict=True):
            table = read_table(StoragePath(self._shards[0][shard]), ["source", "record"])
            (example,) = table.slice(position, 1).to_pylist()
            records.append(f"{example['source']}: {example['record']}")
        return records

    def dataset(self, first: int, workers: int) -> Any:
        """Return a Ray dataset of the rows of all workers, from step ``first`` on, to be split among them in order."""
        blocks = ray_stream.plan_blocks(self.row_plan, self._find_slices, first, workers)
        paths = tuple(self._shards[0])
        tasks = [ray_stream.ReadTask(task, paths, self.capacity, self.document_mask) for task in blocks]
        return ray_stream.ray_dataset(tasks, self.execution_options(workers))

    def execution_options(self, workers: int) -> Any:
        """Return the ``ray.data.ExecutionOptions`` for ``dataset``."""
        return ray_stream.execution_options(self.row_plan, workers)

    def batches(self, tables: Iterable[pa.Table], workers: int) -> Iterator[Batch]:
        """Yield a worker's rows of each step, from its split of ``dataset``."""
        for table in tables:
            yield from ray_stream.split_block(table, -(-self.row_plan.global_batch_size // workers))

    def _find_slices(self, rows: Sequence[int] | np.ndarray) -> RowSlices:
        """Find the segments of rows in the shards."""
        _, shard_ends = self._shards
        shard_starts = np.concatenate([[0], shard_ends[:-1]])
        row_plan, segments = self.row_plan, self.row_plan.segments
        offsets = segments.offsets
        of_rows = [np.arange(offsets[row], offsets[row + 1]) if row >= 0 else np.empty(0, np.int64) for row in rows]
        chosen = np.concatenate(of_rows) if of_rows else np.empty(0, np.int64)
        examples = segments.examples[chosen]
        shards = np.searchsorted(shard_ends, examples, side="right")
        return RowSlices(
            rows=np.asarray(rows, np.int64),
            counts=np.array([len(indices) for indices in of_rows], np.int32),
            shards=shards.astype(np.int32),
            positions=(examples - shard_starts[shards]).astype(np.int32),
            starts=segments.starts[chosen].astype(np.int32),
            stops=segments.stops[chosen].astype(np.int32),
            sources=row_plan.sources[chosen] if len(self._manifests) > 1 else None,
            weights=None if row_plan.weights is None else row_plan.weights[examples],
        )

    @cached_property
    def _manifests(self) -> list[Manifest]:
        """Manifests of all sources, those of ``earlier`` first."""
        return [*(self.earlier._manifests if self.earlier else []), *self._own_manifests]

    @cached_property
    def _own_manifests(self) -> list[Manifest]:
        return [load_manifest(StoragePath(path)) for path in self.manifests]

    @cached_property
    def _shards(self) -> tuple[list[str], np.ndarray]:
        """Paths of all shards, and [shards] index of the example after each shard's last."""
        paths: list[str] = []
        ends: list[np.ndarray] = []
        first = 0
        for manifest in self._manifests:
            paths.extend(path.location for path in manifest.shard_paths())
            ends.append(manifest.shard_ends() + first)
            first += len(manifest)
        return paths, np.concatenate(ends)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
