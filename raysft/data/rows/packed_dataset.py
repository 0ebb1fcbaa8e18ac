"""Packed rows of tokenized examples, in a known order, for any number of workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from raysft.data.rows import mixture, node_reader, plan_file, ray_stream
from raysft.data.rows.collate import Batch, RowSlices, collate
from raysft.data.rows.copies import Copies, find_copies
from raysft.data.rows.image_load import ImageLoad, image_load
from raysft.data.rows.plan_file import PlannedRows, SourceFiles
from raysft.data.rows.row_layouts import ranges
from raysft.data.rows.row_plan import Layout, Mixing, RowPlan, SourceLengths, plan_rows, rows_for_rank
from raysft.data.rows.splice import splice
from raysft.data.shards.manifest import ShardFiles, load_digests, load_manifest, load_shard_files
from raysft.data.sources.pickle_guard import read_table
from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath

LATER = ("repeat", "apart_from")
"""Fields missing in earlier versions."""
PLANNED_AT = "_planned_at"
"""What a pickled dataset carries besides its fields: where its plan is."""


@dataclass(frozen=True)
class PackedDataset:
    """The rows of one or several sources under a row plan.

    The plan is in a file next to the shards of the first source, named by its content. Every process that needs it maps it into
    memory: the driver, workers, data tasks, restarted and resumed runs. A dataset is cheap to pickle, and carries the location
    of its plan.
    """

    manifests: tuple[str, ...]
    """Paths or URIs of the manifests, one for each source."""
    capacity: int
    """Tokens in a row."""
    global_batch_size: int | None = None
    """Rows in a step; None: ``row_plan`` chooses the number."""
    seed: int = 0
    epochs: float = 1
    max_steps: int | None = None
    layout: Layout = "packed"
    mixing: Mixing = "concat"
    mixing_weights: tuple[float, ...] = ()
    """Weights of the sources in the mixture. Default: all the same."""
    document_mask: bool = True
    shuffle: bool = True
    repeat: bool = False
    """Epochs follow each other, regardless of ``epochs``, until there are ``max_steps``."""
    apart_from: tuple[str, ...] | None = None
    """Paths of the manifests of evaluation sets whose examples are left out, as are all but the first copy of an example. None:
    every example is used."""
    earlier: PackedDataset | None = None
    """Rows of the first epochs, if the data changed during the run. All of its epochs come first; then those of this dataset
    with a higher number."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PackedDataset:
        """Build a dataset from the result of ``to_dict``."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        earlier = fields.pop("earlier", None)
        return cls(**fields, earlier=cls.from_dict(earlier) if earlier else None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything that determines the rows, as JSON."""
        # Choosing the batch size needs the manifests, and those of a finished run may have been deleted with the cache.
        chosen = self if self.global_batch_size else replace(self, global_batch_size=self.row_plan.global_batch_size)
        return {**chosen._described(), "earlier": self.earlier and self.earlier.to_dict()}

    def _described(self) -> dict[str, Any]:
        """Fields by name. Those added by later versions are left out at their defaults, so that names that are hashes stay."""
        defaults = {name: self.__dataclass_fields__[name].default for name in LATER}
        return {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in LATER or getattr(self, name) != defaults[name]
        }

    def content(self) -> dict[str, Any]:
        """Return everything that determines the rows and their tokens, as JSON, independent of where the manifests are stored.

        Shards have unique names, so a set that was written again, perhaps in a different order, differs.
        """
        return {
            **self.to_dict(),
            "manifests": [[files.key, *files.shards] for files in self._own_files],
            **self._named_apart(),
            "earlier": self.earlier and self.earlier.content(),
        }

    def has_same_epochs(self, other: PackedDataset) -> bool:
        """Return True if an epoch has the same rows in both, independent of where the manifests are stored."""

        def epoch(dataset: PackedDataset) -> PackedDataset:
            names = tuple(StoragePath(path).parent.name for path in dataset.manifests)
            return replace(
                dataset,
                manifests=names,
                apart_from=dataset._keys_apart,
                epochs=1,
                max_steps=None,
                repeat=False,
                earlier=None,
            )

        return epoch(self) == epoch(other)

    @cached_property
    def row_plan(self) -> RowPlan:
        """The order of all rows."""
        return self._planned.row_plan

    @cached_property
    def _planned(self) -> PlannedRows:
        """The plan, from its file; the first process that needs it writes the file."""
        known = vars(self).get(PLANNED_AT)
        place = StoragePath(known) if known else self._plan_place
        with suppress(FileNotFoundError, plan_file.DamagedPlan):
            return self._opened(place)
        planned = self._plan()
        # If the cache cannot be written, every process spends the time and memory to plan for itself.
        with suppress(OSError, StorageFailed):
            plan_file.write_plan(planned, place)
            return self._opened(place)
        return planned

    def _opened(self, place: StoragePath) -> PlannedRows:
        planned = plan_file.open_plan(place)
        vars(self)[PLANNED_AT] = place.location
        return planned

    @property
    def _plan_place(self) -> StoragePath:
        """The file of the plan: its name is a hash of everything that determines the rows."""
        key = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()[:24]
        return StoragePath(self.manifests[0]).parent / f"rows-{key}.arrow"

    def _identity(self) -> dict[str, Any]:
        return {
            **self._described(),
            "manifests": [[files.key, *files.shards] for files in self._own_files],
            **self._named_apart(),
            "earlier": self.earlier and self.earlier._identity(),
            "group": mixture.GROUP_EXAMPLES,
            "version": plan_file.VERSION,
        }

    def _plan(self) -> PlannedRows:
        sources = tuple(SourceFiles(files.name, files.shards, files.media) for files in self._files)
        if self.earlier is None:
            return PlannedRows(*self._own_plan(self.max_steps), sources)
        known = self.earlier._planned
        endless = self.repeat and self.max_steps
        over = known.row_plan.steps >= endless if endless else self.earlier.epochs >= self.epochs
        if over:  # the training ends before the data changes
            cut = replace(self.earlier, epochs=self.epochs, max_steps=self.max_steps, repeat=self.repeat)
            return PlannedRows(cut.row_plan, known.shard_ends, sources)
        examples = int(known.shard_ends[-1])
        later, ends = self._own_plan(self._own_steps(known.row_plan.steps))
        spliced = splice(known.row_plan, later, examples, len(known.sources), max_steps=self.max_steps)
        return PlannedRows(spliced, np.concatenate([known.shard_ends, examples + ends]), sources)

    def _own_steps(self, earlier_steps: int) -> int | None:
        """Return how many steps a plan of this dataset's own sources needs, from the first epoch on; None if its epochs decide."""
        if not self.repeat or self.max_steps is None or self.earlier is None:
            return None
        skipped = replace(self, epochs=self.earlier.epochs, max_steps=None, repeat=False, earlier=None)
        return skipped._own_plan(None)[0].steps + self.max_steps - earlier_steps

    def _own_plan(self, max_steps: int | None) -> tuple[RowPlan, np.ndarray]:
        """Plan the rows of its own sources; returns the plan and [shards] the index of the example after each shard's last."""
        weights = self.mixing_weights or (1.0,) * len(self.manifests)
        manifests = [load_manifest(StoragePath(path)) for path in self.manifests]
        firsts = np.cumsum([0, *map(len, manifests)])
        ends = np.concatenate([first + manifest.ends for first, manifest in zip(firsts, manifests, strict=False)])
        dropped = None if self.apart_from is None else self._copies().dropped
        row_plan = plan_rows(
            [
                SourceLengths(
                    manifest.lengths,
                    manifest.loss_tokens,
                    manifest.ends,
                    weight,
                    manifest.weights,
                    None if dropped is None else np.flatnonzero(~dropped[first : first + len(manifest)]),
                )
                for first, manifest, weight in zip(firsts.tolist(), manifests, weights, strict=False)
            ],
            capacity=self.capacity,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            epochs=self.epochs,
            max_steps=max_steps,
            repeat=self.repeat and max_steps is not None,
            layout=self.layout,
            mixing=self.mixing,
            document_mask=self.document_mask,
            shuffle=self.shuffle,
        )
        return row_plan, ends

    def _copies(self) -> Copies:
        """Copies among the examples of this dataset's own sources and of the sets in ``apart_from``."""
        train, apart = (
            [load_digests(StoragePath(path)) for path in paths] for paths in (self.manifests, self.apart_from or ())
        )
        return find_copies(train, apart)

    def _named_apart(self) -> dict[str, Any]:
        return {} if self._keys_apart is None else {"apart_from": self._keys_apart}

    @property
    def _keys_apart(self) -> tuple[str, ...] | None:
        """Names of the sets in ``apart_from`` in the cache, which identify their content, independent of where they are stored."""
        return None if self.apart_from is None else tuple(StoragePath(path).parent.name for path in self.apart_from)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of their numbers."""
        return tuple(source.name for source in self._planned.sources)

    @property
    def has_media(self) -> bool:
        """True if an example of a source has images."""
        return any(source.media for source in self._planned.sources)

    @property
    def media_per_row(self) -> float:
        """Average number of images in a row."""
        planned, segments = self._planned, self.row_plan.segments
        media, examples = sum(source.media for source in planned.sources), int(planned.shard_ends[-1])
        return media / examples * len(segments.examples) / self.row_plan.rows if media else 0.0

    def image_load(self, rows: int) -> ImageLoad | None:
        """Return the images of the microbatch of this many rows that has the most; None if there are none."""
        if not self.has_media:
            return None
        return image_load(self._paths, self._planned.shard_ends, self.row_plan.segments, rows)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Read and pack rows, given their numbers; −1 gives a filler row without labels."""
        return collate(self._find_slices(rows), self._paths, self.capacity, self.document_mask, self.has_media)

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
            table = read_table(StoragePath(self._paths[shard]), ["source", "record"])
            (example,) = table.slice(position, 1).to_pylist()
            records.append(f"{example['source']}: {example['record']}")
        return records

    def dataset(self, first: int, workers: int, group: int = 1) -> Any:
        """Return a Ray dataset of all workers' rows, from step ``first`` on, to be split among them in order.

        Args:
            first: the step.
            workers: their number.
            group: this many consecutive workers have the same rows.
        """
        pieces = list(ray_stream.plan_pieces(self.row_plan, first, workers // group, self.media_per_row))
        return ray_stream.ray_dataset(self, pieces, workers, group)

    def node_shards(self, first: int, nodes: Sequence[str], data_label: str | None = None, group: int = 1) -> list[Any]:
        """Return the rows of each worker, from step ``first`` on, as a reader on its node makes them.

        Args:
            first: the step.
            nodes: [workers] Ray's id of the node of each worker.
            data_label: of the nodes for data, where readers run. Default: those of the workers.
            group: this many consecutive workers have the same rows.
        """
        return list(node_reader.node_shards(self, first, nodes, data_label, group))

    def execution_options(self, workers: int, group: int = 1) -> Any:
        """Return the ``ray.data.ExecutionOptions`` for ``dataset``."""
        return ray_stream.execution_options(self.row_plan, workers, self.media_per_row, group)

    def batches(self, tables: Iterable[pa.Table], workers: int) -> Iterator[Batch]:
        """Yield a worker's rows of each step, from its split of ``dataset`` or its shard of ``node_shards``.

        Args:
            tables: that split or shard.
            workers: number of workers, or of groups of them that have the same rows.
        """
        for table in tables:
            yield from ray_stream.split_block(table, -(-self.row_plan.global_batch_size // workers))

    def _find_slices(self, rows: Sequence[int] | np.ndarray) -> RowSlices:
        """Locate the segments of rows in the shards."""
        planned, row_plan = self._planned, self.row_plan
        numbers, segments = np.asarray(rows, np.int64), row_plan.segments
        filled = np.maximum(numbers, 0)
        firsts = segments.offsets[filled]
        counts = np.where(numbers >= 0, segments.offsets[filled + 1] - firsts, 0)
        chosen = np.repeat(firsts, counts) + ranges(counts)
        examples = segments.examples[chosen]
        shards = np.searchsorted(planned.shard_ends, examples, side="right")
        shard_starts = np.concatenate([[0], planned.shard_ends[:-1]])
        return RowSlices(
            rows=numbers,
            counts=counts.astype(np.int32),
            shards=shards.astype(np.int32),
            positions=(examples - shard_starts[shards]).astype(np.int32),
            starts=segments.starts[chosen].astype(np.int32),
            stops=segments.stops[chosen].astype(np.int32),
            sources=row_plan.sources[chosen] if len(planned.sources) > 1 else None,
            weights=None if row_plan.weights is None else row_plan.weights[examples],
        )

    @cached_property
    def _files(self) -> list[ShardFiles]:
        """Files of all sources, those of ``earlier`` first."""
        return [*(self.earlier._files if self.earlier else []), *self._own_files]

    @cached_property
    def _own_files(self) -> list[ShardFiles]:
        return [load_shard_files(StoragePath(path)) for path in self.manifests]

    @property
    def _all_manifests(self) -> tuple[str, ...]:
        return (*(self.earlier._all_manifests if self.earlier else ()), *self.manifests)

    @cached_property
    def _paths(self) -> list[str]:
        """Paths of the shards of all sources."""
        folders = [StoragePath(path).parent for path in self._all_manifests]
        return [
            (folder / shard).location
            for folder, source in zip(folders, self._planned.sources, strict=True)
            for shard in source.shards
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in (*self.__dataclass_fields__, PLANNED_AT) if name in vars(self)}
