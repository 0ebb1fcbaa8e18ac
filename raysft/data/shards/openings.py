"""Which examples ``data.holdout`` keeps out of training. For a number of examples, the openings of all of them are hashed first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.config import Config
from raysft.data.shards.ray_pipeline import (
    LOCAL_BYTES,
    READ_CPUS,
    Notify,
    data_context,
    read_task,
    read_tasks,
    text_bytes,
)
from raysft.data.shards.shard_set import ShardSet, records_identity, resolve_shard_set
from raysft.data.sources.formats import to_examples
from raysft.data.sources.holdout import limit_of_count, limit_of_fraction, opening_hash
from raysft.data.sources.pickle_guard import read_table
from raysft.data.sources.readers import RawRecord
from raysft.data.types import Example
from raysft.errors import RequestError, StorageFailed
from raysft.storage.path import StoragePath

VERSION = 4
"""Part of every key. Raise it when the same records would have other openings."""


@dataclass(frozen=True)
class HeldOut:
    """Examples that are kept out of training."""

    limit: int
    """Hash of an opening below which an example is held out."""
    sources: frozenset[str]
    """Names of the training sources that may have such examples."""

    @classmethod
    def of(cls, config: Config, model: str, notify: Notify = lambda line: None) -> HeldOut:
        """Find out what ``data.holdout`` holds out.

        Args:
            config: the run's config.
            model: folder or Hub id of the model whose tokenizer is used.
            notify: called with lines about the progress.

        Raises:
            RequestError: a source cannot be read, or nothing would be left to train on.
        """
        holdout, names = config.data.holdout, [source.name for source in config.data.train]
        if not isinstance(holdout, int) or not holdout:
            return cls(limit_of_fraction(holdout), frozenset(names if holdout else ()))
        sets = [resolve_shard_set(config, source, "all", model, with_prompts=False) for source in config.data.train]
        hashes = [_openings(each, config, notify) for each in sets]
        limit = limit_of_count(holdout, np.concatenate(hashes))
        below = [bool(len(values)) and int(values.min()) < limit for values in hashes]
        return cls(limit, frozenset(name for name, found in zip(names, below, strict=True) if found))


def _openings(each: ShardSet, config: Config, notify: Notify) -> np.ndarray:
    """[examples] uint64 hashes of a source's openings, from the cache if they are there."""
    identity = json.dumps({"version": VERSION, **records_identity(each)}, sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:24]
    path = config.cache_directory / "openings" / f"{each.source.name}-{key}.parquet"
    with suppress(OSError, StorageFailed, pa.ArrowException, KeyError):
        return read_table(path)["opening"].to_numpy()
    size = sum(map(text_bytes, each.files))
    if size > LOCAL_BYTES:
        notify(f"reading {each.source.name!r} to choose data.holdout={config.data.holdout} of its examples")
    parts = list(_in_this_process(each) if size <= LOCAL_BYTES else _on_cluster(each, config.scaling.data_label))
    hashes = np.concatenate([np.empty(0, np.uint64), *parts])
    with suppress(OSError, StorageFailed):
        _write(path, hashes)
    return hashes


def _write(path: StoragePath, hashes: np.ndarray) -> None:
    table = pa.table({"opening": hashes})
    path.write(lambda stream: pq.write_table(table, stream, use_dictionary=False))


def hash_openings(records: Sequence[tuple[str, RawRecord]], each: ShardSet) -> np.ndarray:
    """[examples] uint64 hashes of the openings of some records; those that cannot be trained on have none."""
    found = (item for item, _ in to_examples(records, each.source) if isinstance(item, Example) and not item.unanswered)
    return np.fromiter((opening_hash(example) for example in found), np.uint64)


def _tasks(each: ShardSet) -> list[dict[str, Any]]:
    return [{"task": (0, files, each.source.max_examples, each.sample)} for files in read_tasks(each)]


def _hash_task(row: dict[str, Any], each: ShardSet) -> dict[str, Any]:
    """Task: hash the openings of the records that ``read_task`` has read."""
    import pickle

    error = row["error"]
    hashes = b"" if error else hash_openings(pickle.loads(row["records"]), each).tobytes()
    return {"hashes": hashes, "error": error}


def _in_this_process(each: ShardSet) -> Iterator[np.ndarray]:
    rows = (_hash_task(row, each) for task in _tasks(each) for row in read_task(task))
    yield from map(_hashes_of, rows)


def _on_cluster(each: ShardSet, data_label: str | None) -> Iterator[np.ndarray]:
    """Do what ``_in_this_process`` does, in tasks of Ray Data."""
    import ray

    from raysft.cluster.connect import ensure_cluster
    from raysft.cluster.placement import TASK_CPUS

    ensure_cluster()
    tasks = _tasks(each)
    with ray.data.DataContext.current(data_context(data_label)):
        rows = (
            ray.data.from_items(tasks, override_num_blocks=len(tasks))
            .flat_map(read_task, num_cpus=READ_CPUS)
            .map(partial(_hash_task, each=each), num_cpus=TASK_CPUS - READ_CPUS)
            .iter_rows()
        )
        yield from map(_hashes_of, rows)


def _hashes_of(row: dict[str, Any]) -> np.ndarray:
    if row["error"]:
        raise RequestError(row["error"])
    return np.frombuffer(row["hashes"], np.uint64)
