"""Row plans as files, which all processes of a node map into memory: the plan of 100 million examples takes 2 GB.

A file is an Arrow IPC file with one row. Each array of the plan is a column of lists; everything else about the rows is JSON in
the schema's metadata. A file is only ever read as numbers and text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysft.data.rows.row_layouts import Segments
from raysft.data.rows.row_plan import STEP_SUMS, RowPlan
from raysft.data.sources.pickle_guard import refuse_pickles
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath

VERSION = 1
"""Part of every plan's name. Increase it when the same data would be planned differently, or the file format changes."""
SEGMENTS = ("offsets", "examples", "starts", "stops", "loss_tokens")
"""Names of the arrays of ``Segments``, in order."""
PLAIN = ("sources", "weights", "group_ends", "epoch_ends")
"""Arrays of ``RowPlan`` besides its segments."""


class DamagedPlan(ValueError):
    """A file does not hold a row plan."""


@dataclass(frozen=True)
class SourceFiles:
    """A source and the names of its shards."""

    name: str
    shards: tuple[str, ...]
    media: int = 0
    """Images of its examples."""


@dataclass(frozen=True)
class PlannedRows:
    """A row plan, and the shards that its examples are in."""

    row_plan: RowPlan
    shard_ends: np.ndarray
    """[shards of all sources] index of the example after each shard's last."""
    sources: tuple[SourceFiles, ...]


def write_plan(planned: PlannedRows, path: StoragePath) -> None:
    """Write a plan; the file appears only once it is complete."""
    row_plan = planned.row_plan
    arrays: dict[str, np.ndarray | None] = {
        **dict(zip(SEGMENTS, row_plan.segments, strict=True)),
        **{name: getattr(row_plan, name) for name in (*PLAIN, *STEP_SUMS)},
        "shard_ends": planned.shard_ends,
    }
    columns = {name: _one_list(values) for name, values in arrays.items() if values is not None}
    metadata = {
        "capacity": row_plan.capacity,
        "global_batch_size": row_plan.global_batch_size,
        "sources": [asdict(source) for source in planned.sources],
    }
    table = pa.table(columns).replace_schema_metadata({"raysft": json.dumps(metadata)})

    def write(stream: Any) -> None:
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)

    path.write(write)


def _one_list(values: np.ndarray) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), pa.array(np.ascontiguousarray(values)))


@lru_cache(maxsize=8)
def open_plan(path: StoragePath) -> PlannedRows:
    """Map a plan into memory; a node copies one from an object store once.

    Raises:
        FileNotFoundError: there is none.
        DamagedPlan: the file does not hold a row plan.
    """
    file = Path(local_copy(path.location))
    try:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        refuse_pickles(table.schema)
        metadata = json.loads((table.schema.metadata or {})[b"raysft"])
        arrays = {name: table[name].chunk(0).values.to_numpy() for name in table.column_names}
        row_plan = RowPlan(
            segments=Segments(*(arrays[name] for name in SEGMENTS)),
            **{name: arrays.get(name) for name in PLAIN},  # pyright: ignore[reportArgumentType]
            capacity=int(metadata["capacity"]),
            global_batch_size=int(metadata["global_batch_size"]),
        )
        vars(row_plan).update({name: arrays[name] for name in STEP_SUMS})
        sources = tuple(
            SourceFiles(each["name"], tuple(each["shards"]), int(each.get("media", 0))) for each in metadata["sources"]
        )
        return PlannedRows(row_plan, arrays["shard_ends"], sources)
    except (pa.ArrowException, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamagedPlan(f"{path}: is not a row plan: {error}") from error
