"""What a set of shards holds: lengths and trained tokens of its examples, by which everything else is planned."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.sources.pickle_guard import read_table
from raysft.data.tokenization.turn_ends import TurnObservation, merge_counts
from raysft.data.types import Rejected
from raysft.errors import RequestError
from raysft.storage.path import StoragePath


@dataclass(frozen=True)
class Manifest:
    """Lengths and trained tokens of a set's examples: all that planning needs."""

    name: str
    """Name of the source."""
    directory: StoragePath
    shards: tuple[str, ...]
    """File names in ``directory``."""
    shard_index: np.ndarray
    """[examples] int32 index of the shard, not decreasing."""
    lengths: np.ndarray
    """[examples] int32."""
    loss_tokens: np.ndarray
    """[examples] int32."""
    records: int
    """Records read, usable or not."""
    rejected: tuple[Rejected, ...]
    dropped: tuple[Rejected, ...]
    """Conversations that were longer than a row, with ``data.on_overflow: drop``."""
    counts: dict[str, int]
    """What happened to how many: ``truncated``, ``truncated_tokens``, ``split``, ``dropped_tokens``, ``control_tokens`` …"""
    largest_token: tuple[int, str]
    """The largest token id, and a record that holds it."""
    turns: Counter[TurnObservation]
    """How the turns that are trained on begin and end."""
    formats: tuple[str, ...]
    """Formats that were found."""
    weights: np.ndarray | None
    """[examples] float32 what each trained token counts; None where no example has a weight."""
    key: str
    reused: bool = False
    """Whether it was in the cache before."""

    def __len__(self) -> int:
        return len(self.lengths)

    def shard_ends(self) -> np.ndarray:
        """[shards] index of the example after each shard's last."""
        return np.searchsorted(self.shard_index, np.arange(len(self.shards)), side="right")

    def shard_paths(self) -> list[StoragePath]:
        """Where the shards are."""
        return [self.directory / shard for shard in self.shards]


@dataclass(frozen=True)
class Shard:
    """What one task made of some records for one set."""

    name: str
    """File in the set's folder; empty where no example was usable."""
    records: int
    lengths: np.ndarray
    loss_tokens: np.ndarray
    weights: np.ndarray
    rejected: tuple[Rejected, ...]
    dropped: tuple[Rejected, ...]
    longest_dropped: int
    """Tokens of the longest example that was dropped; 0 where none was."""
    counts: dict[str, int]
    largest_token: tuple[int, str]
    turns: Counter[TurnObservation]
    formats: tuple[str, ...]


def is_complete(path: StoragePath) -> bool:
    """Whether a manifest and all shards that it names are there as they were written; what is damaged is written again."""
    there = path.parent.entries()  # one question for all of them
    if path.name not in there:
        return False
    try:
        sizes = _detail(read_table(path).schema)["sizes"]
        return all(name in there and there[name].size == size for name, size in sizes.items())
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return False


def _detail(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {})[b"raysft"])


def save_manifest(path: StoragePath, name: str, shards: Sequence[Shard]) -> None:
    """Put the manifest in place: from here on the set is complete. One that another run has put there stays."""
    whole = [shard for shard in shards if shard.name]
    if is_complete(path):
        for shard in whole:
            (path.parent / shard.name).remove()
        return
    counts, there = Counter[str](), path.parent.entries()
    for shard in shards:
        counts.update(shard.counts)
    detail = {
        "name": name,
        "shards": [shard.name for shard in whole],
        "sizes": {shard.name: there[shard.name].size for shard in whole},
        "records": sum(shard.records for shard in shards),
        "rejected": [asdict(item) for shard in shards for item in shard.rejected],
        "dropped": [asdict(item) for shard in shards for item in shard.dropped],
        "counts": dict(counts),
        "largest_token": max((shard.largest_token for shard in shards), key=itemgetter(0)),
        "turns": [[*turn, count] for turn, count in merge_counts(shard.turns for shard in shards).items()],
        "formats": sorted({form for shard in shards for form in shard.formats}),
    }
    columns: dict[str, Any] = {
        "shard": np.repeat(np.arange(len(whole), dtype=np.int32), [len(shard.lengths) for shard in whole]),
        "length": np.concatenate([shard.lengths for shard in whole]),
        "loss_tokens": np.concatenate([shard.loss_tokens for shard in whole]),
    }
    weights = np.concatenate([shard.weights for shard in whole])
    if (weights != 1).any():
        columns["weight"] = weights
    table = pa.table(columns).replace_schema_metadata({"raysft": json.dumps(detail)})
    path.write(lambda stream: pq.write_table(table, stream, compression="zstd"))


def load_manifest(path: StoragePath, reused: bool = False) -> Manifest:
    """Read a manifest.

    Raises:
        RequestError: it is gone or damaged, or names shards that are gone.
    """
    try:
        table = read_table(path)
        detail = _detail(table.schema)
    except FileNotFoundError:
        raise RequestError(
            f"{path}: the tokenized data that this run has trained on is gone; put data.cache back, or choose another run.name"
        ) from None
    except (OSError, pa.ArrowException, KeyError, ValueError):
        raise RequestError(
            f"{path}: the manifest of tokenized shards is damaged; delete the folder {path.parent}"
        ) from None
    there = path.parent.entries()
    for shard in detail["shards"]:
        if shard not in there:
            raise RequestError(f"{path.parent}: shard {shard} is gone; delete the folder, it is written again")
    return Manifest(
        name=detail["name"],
        directory=path.parent,
        shards=tuple(detail["shards"]),
        shard_index=table["shard"].to_numpy(),
        lengths=table["length"].to_numpy(),
        loss_tokens=table["loss_tokens"].to_numpy(),
        records=detail["records"],
        rejected=tuple(Rejected(**item) for item in detail["rejected"]),
        dropped=tuple(Rejected(**item) for item in detail["dropped"]),
        counts=detail["counts"],
        largest_token=tuple(detail["largest_token"]),
        turns=Counter({TurnObservation(*turn): count for *turn, count in detail["turns"]}),
        formats=tuple(detail["formats"]),
        weights=table["weight"].to_numpy() if "weight" in table.column_names else None,
        key=path.parent.name,
        reused=reused,
    )


def write_prompts(manifests: Sequence[Manifest], path: Path, max_examples: int | None, ends: Sequence[int] = ()) -> int:
    """Gather prompts of evaluation sets, spread evenly over each of them, into one Parquet file for generation.

    Columns: ``id`` (unique), ``source``, ``prompt``, ``input_ids`` (list of int32), ``label``. The metadata ``end_tokens`` holds
    ``ends``, the tokens that end an answer to these prompts, as JSON.

    Returns:
        Their number.
    """
    whole = pa.concat_tables([table for manifest in manifests for table in _prompts(manifest, max_examples)])
    whole = whole.replace_schema_metadata({"end_tokens": json.dumps(list(ends))})
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    pq.write_table(whole, draft)
    draft.replace(path)
    return len(whole)


def _prompts(manifest: Manifest, max_examples: int | None) -> Iterator[pa.Table]:
    # Files often hold what is alike side by side: the first N would be N of a kind.
    count = min(max_examples or len(manifest), len(manifest))
    chosen = np.linspace(0, len(manifest) - 1, count).round().astype(np.int64)
    ends = manifest.shard_ends()
    for shard, path in enumerate(manifest.shard_paths()):
        first = int(ends[shard - 1]) if shard else 0
        here = chosen[(chosen >= first) & (chosen < ends[shard])] - first
        if not len(here):
            continue
        table = read_table(path, ["source", "record", "prompt", "prompt_ids", "reference"])
        table = table.take(pa.array(here))
        # An example that was cut into pieces, or came as ids, has none.
        table = table.filter(pa.array([len(ids) > 0 for ids in table["prompt_ids"]]))
        sources, records = table["source"].to_pylist(), table["record"].to_pylist()
        yield pa.table(
            {
                "id": pa.array([f"{source}/{record}" for source, record in zip(sources, records, strict=True)]),
                "source": pa.array(sources),
                "prompt": table["prompt"],
                "input_ids": table["prompt_ids"],
                "label": table["reference"],
            }
        )
