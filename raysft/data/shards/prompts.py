"""The prompts of evaluation sets, in one file for generation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.shards.manifest import Manifest
from raysft.data.shards.media_column import MEDIA, media_column
from raysft.data.sources.pickle_guard import read_table
from raysft.storage.path import StoragePath

ROWS = 8192
"""Prompts that are written at a time, at least."""


def write_prompts(
    manifests: Sequence[Manifest], path: Path, max_examples: int | None, end_tokens: Sequence[int] = ()
) -> int:
    """Collect prompts of evaluation sets, spread evenly over each set, into one Parquet file for generation.

    One shard is in memory at a time.

    Columns: ``id`` (unique), ``source``, ``prompt``, ``input_ids`` (list of int32), ``label`` and, if there are images, ``media``
    with their places in ``input_ids``. The schema metadata ``end_tokens`` holds, as JSON, the IDs of the tokens that end an answer
    to these prompts.

    Args:
        manifests: sets that were tokenized with prompts.
        path: file to write.
        max_examples: limit for each set.
        end_tokens: IDs to store in the metadata.

    Returns:
        Number of prompts.
    """

    def write(stream: Any) -> int:
        written = 0
        schema = WITH_MEDIA if any(manifest.media for manifest in manifests) else SCHEMA
        with pq.ParquetWriter(stream, schema.with_metadata({"end_tokens": json.dumps(list(end_tokens))})) as writer:
            for table in _gathered(
                table for manifest in manifests for table in _prompts(manifest, max_examples, schema)
            ):
                writer.write_table(table)
                written += len(table)
        return written

    return StoragePath.of(path).write(write)


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "input_ids": pa.list_(pa.int32()),
        "label": pa.string(),
    }
)
WITH_MEDIA = SCHEMA.append(pa.field("media", MEDIA))


def _gathered(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of small tables together: each write makes a group of rows, which costs a reader time."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) >= ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def has_answered_prompt(manifest: Manifest, max_examples: int | None) -> bool:
    """Return True if a set has a prompt with an answer among those that ``write_prompts`` takes of it."""
    return any(label for table in _prompts(manifest, max_examples) for label in table["label"].to_pylist())


def _prompts(manifest: Manifest, max_examples: int | None, schema: pa.Schema = SCHEMA) -> Iterator[pa.Table]:
    # Similar records often stand next to each other in a file, so the first N would not be representative.
    count = min(max_examples or len(manifest), len(manifest))
    selected = np.linspace(0, len(manifest) - 1, count).round().astype(np.int64)
    edges = np.searchsorted(selected, [0, *manifest.ends])
    for shard, path in enumerate(manifest.shard_paths()):
        in_shard = selected[edges[shard] : edges[shard + 1]] - (int(manifest.ends[shard - 1]) if shard else 0)
        if not len(in_shard):
            continue
        columns = ["source", "record", "prompt", "prompt_ids", "reference"]
        if "media" in schema.names and "prompt_media" in path.read(pq.read_schema).names:
            columns.append("prompt_media")
        table = read_table(path, columns)
        table = table.take(pa.array(in_shard))
        # Examples that were split, or that came as token IDs, have no prompt.
        table = table.filter(pa.array([len(ids) > 0 for ids in table["prompt_ids"]]))
        sources, records = table["source"].to_pylist(), table["record"].to_pylist()
        found = pa.table(
            {
                "id": pa.array([f"{source}/{record}" for source, record in zip(sources, records, strict=True)]),
                "source": pa.array(sources, pa.string()),
                "prompt": table["prompt"],
                "input_ids": table["prompt_ids"],
                "label": table["reference"],
                "media": table["prompt_media"] if "prompt_media" in columns else media_column([()] * len(table)),
            }
        )
        yield found.select(schema.names).cast(schema)
