"""Shard sets whose tokens are computed from their place: written in milliseconds, without a tokenizer, the same everywhere."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.shards.manifest import Shard, save_manifest
from raysft.data.types import IGNORE_INDEX
from raysft.storage.path import StoragePath


def tokens(source: int, example: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of one example; a third of it has no label."""
    ids = ((np.arange(length) * 7 + example * 31 + source * 101) % 1000).astype(np.int32)
    return ids, np.where(np.arange(length) < max(1, length // 3), IGNORE_INDEX, ids).astype(np.int32)


def write_set(
    folder: Path | StoragePath,
    lengths: np.ndarray,
    source: int = 0,
    shard_examples: int = 1000,
    weights: np.ndarray | None = None,
    with_tokens: bool = True,
) -> str:
    """Write a set with examples of these lengths; returns the path of its manifest.

    Args:
        folder: of the set; its name is the set's key and the source's name.
        lengths: [examples] tokens.
        source: a number that changes all tokens.
        shard_examples: examples in a shard.
        weights: [examples] loss weights; all 1 by default.
        with_tokens: False writes empty files in place of shards, for plans that nobody reads rows of.
    """
    place = StoragePath.of(folder)
    shards = []
    for number, first in enumerate(range(0, len(lengths), shard_examples)):
        chosen = slice(first, first + shard_examples)
        name = f"{number:06d}.parquet"
        if with_tokens:
            write_shard(place / name, source, first, lengths[chosen])
        else:
            (place / name).write_bytes(b"")
        of_shard = lengths[chosen].astype(np.int32)
        shards.append(
            Shard(
                name=name,
                records=len(of_shard),
                lengths=of_shard,
                loss_tokens=(of_shard - np.maximum(1, of_shard // 3)).astype(np.int32),
                weights=np.ones(len(of_shard), np.float32) if weights is None else weights[chosen].astype(np.float32),
                rejected=(),
                dropped=(),
                longest_dropped=0,
                counts={},
                largest_token=(999, "0"),
                turns=Counter(),
                formats=("text",),
                digests=np.stack([np.full(len(of_shard), source), first + np.arange(len(of_shard))], axis=1).astype(
                    np.uint64
                ),
            )
        )
    save_manifest(place / "manifest.parquet", place.name, shards)
    return (place / "manifest.parquet").location


def write_shard(path: StoragePath, source: int, first: int, lengths: np.ndarray) -> None:
    """Write a shard.

    Args:
        path: file to write.
        source: as ``write_set`` takes it.
        first: number of its first example.
        lengths: [examples] tokens.
    """
    made = [tokens(source, first + index, int(length)) for index, length in enumerate(lengths)]
    records = [f"{source}.jsonl:{first + index}" for index in range(len(lengths))]
    table = pa.table(
        {
            "input_ids": pa.array([ids for ids, _ in made], pa.list_(pa.int32())),
            "labels": pa.array([labels for _, labels in made], pa.list_(pa.int32())),
            "source": pa.array([str(source)] * len(lengths)).dictionary_encode(),
            "record": pa.array(records),
        }
    )
    path.write(partial(pq.write_table, table))
