"""The manifest of a shard set: lengths and loss tokens of its examples, from which all rows are planned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysft.data.sources.pickle_guard import read_table
from raysft.data.tokenization.turn_ends import TurnObservation, merge_counts
from raysft.data.types import Rejected
from raysft.errors import RequestError
from raysft.media.files import Identity, identity
from raysft.storage.path import StoragePath

FILE_NAME = "manifest.parquet"
"""Name of a manifest in the folder of its set."""
MOST_UNUSABLE = 100
"""Most unusable files that are remembered, as each is looked at whenever the set is used."""
DIGEST = ("digest_high", "digest_low")
"""Columns with the two halves of each example's ``content_digest``. Plans do without, so that they are read apart."""


@dataclass(frozen=True)
class Manifest:
    """Lengths and loss tokens of a shard set's examples, which is all that planning needs."""

    name: str
    """Name of the source."""
    directory: StoragePath
    shards: tuple[str, ...]
    """File names in ``directory``."""
    ends: np.ndarray
    """[shards] index one past the last example of each shard."""
    lengths: np.ndarray
    """[examples] int32 tokens."""
    loss_tokens: np.ndarray
    """[examples] int32 tokens with a label."""
    records: int
    """Records read, usable or not."""
    rejected: tuple[Rejected, ...]
    """Records that cannot be used."""
    dropped: tuple[Rejected, ...]
    """Conversations longer than a row, with ``data.on_overflow: drop``."""
    counts: dict[str, int]
    """Event → number: ``truncated``, ``truncated_tokens``, ``split``, ``dropped_tokens``, ``control_tokens`` …"""
    largest_token: tuple[int, str]
    """The largest token ID, and a record that contains it."""
    turns: Counter[TurnObservation]
    """How the turns with loss begin and end."""
    formats: tuple[str, ...]
    """Record formats that occur in the source."""
    weights: np.ndarray | None
    """[examples] float32 loss weight of each example's tokens; None if no example has a weight."""
    key: str
    """Name of the set in the cache, which identifies its content."""
    reused: bool = False
    """True if the set was in the cache already."""
    media: int = 0
    """Images and videos of its examples."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def path(self) -> StoragePath:
        """The file that it was read from."""
        return self.directory / FILE_NAME

    def shard_paths(self) -> list[StoragePath]:
        """Paths of the shard files."""
        return [self.directory / shard for shard in self.shards]


@dataclass(frozen=True)
class Shard:
    """Facts about one written shard, collected into the manifest; the fields are those of ``Manifest``."""

    name: str
    """File name in the set's folder; empty if no example was usable."""
    records: int
    lengths: np.ndarray
    loss_tokens: np.ndarray
    weights: np.ndarray
    rejected: tuple[Rejected, ...]
    dropped: tuple[Rejected, ...]
    longest_dropped: int
    """Tokens of the longest dropped example; 0 if none was dropped."""
    counts: dict[str, int]
    largest_token: tuple[int, str]
    turns: Counter[TurnObservation]
    formats: tuple[str, ...]
    digests: np.ndarray
    """[examples, 2] uint64 ``content_digest``."""
    media: int = 0
    """Images and videos of its examples."""
    unusable: Mapping[str, Identity] = field(default_factory=dict)
    """Files that no image could be made of → what each was then."""
    columns: tuple[str, ...] = ()
    """Columns that the source names and a record has, usable or not."""


def is_complete(path: StoragePath) -> bool:
    """True if a manifest and all its shards exist with the sizes they were written with.

    A damaged set counts as incomplete, so that it is written again.
    """
    files = path.parent.entries()  # one request for all shards
    if path.name not in files:
        return False
    try:
        sizes = _metadata(path.read(pq.read_schema))["sizes"]
        return all(name in files and files[name].size == size for name, size in sizes.items())
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return False


def mended_files(path: StoragePath) -> dict[str, Identity]:
    """Find files for which records of a set were rejected, as no image could be made of them, and that have changed since.

    Returns:
        Their locations → what each is now; empty without a manifest.

    Raises:
        StorageFailed: a storage does not respond.
    """
    try:
        unusable = _metadata(path.read(pq.read_schema)).get("unusable", {})
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return {}
    return {file: now for file, old in unusable.items() if (now := identity(file)) != old}


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {})[b"raysft"])


def save_manifest(path: StoragePath, name: str, shards: Sequence[Shard]) -> None:
    """Write the manifest, which completes the set.

    If another run has completed the set in the meantime, its manifest stays and the shards of this run alone are removed.
    """
    written = [shard for shard in shards if shard.name]
    if is_complete(path):
        for name in {shard.name for shard in written}.difference(_metadata(path.read(pq.read_schema))["shards"]):
            (path.parent / name).remove()
        return
    counts, files = Counter[str](), path.parent.entries()
    for shard in shards:
        counts.update(shard.counts)
    metadata = {
        "name": name,
        "shards": [shard.name for shard in written],
        "sizes": {shard.name: files[shard.name].size for shard in written},
        "records": sum(shard.records for shard in shards),
        "rejected": [asdict(item) for shard in shards for item in shard.rejected],
        "dropped": [asdict(item) for shard in shards for item in shard.dropped],
        "counts": dict(counts),
        "largest_token": max((shard.largest_token for shard in shards), key=itemgetter(0)),
        "turns": [[*turn, count] for turn, count in merge_counts(shard.turns for shard in shards).items()],
        "formats": sorted({form for shard in shards for form in shard.formats}),
        "media": sum(shard.media for shard in shards),
        "unusable": dict(islice((item for shard in shards for item in shard.unusable.items()), MOST_UNUSABLE)),
    }
    columns: dict[str, Any] = {
        "shard": np.repeat(np.arange(len(written), dtype=np.int32), [len(shard.lengths) for shard in written]),
        "length": np.concatenate([shard.lengths for shard in written]),
        "loss_tokens": np.concatenate([shard.loss_tokens for shard in written]),
    }
    weights = np.concatenate([shard.weights for shard in written])
    if (weights != 1).any():
        columns["weight"] = weights
    digests = np.concatenate([shard.digests for shard in written])
    columns |= {name: digests[:, number] for number, name in enumerate(DIGEST)}
    table = pa.table(columns).replace_schema_metadata({"raysft": json.dumps(metadata)})
    path.write(lambda stream: pq.write_table(table, stream, compression="zstd"))


@dataclass(frozen=True)
class ShardFiles:
    """The files of a shard set."""

    name: str
    """Name of the source."""
    directory: StoragePath
    shards: tuple[str, ...]
    """File names in ``directory``."""
    media: int = 0
    """Images of its examples."""

    @property
    def key(self) -> str:
        """Name of the set in the cache, which identifies its content."""
        return self.directory.name

    def paths(self) -> list[StoragePath]:
        """Paths of the shard files."""
        return [self.directory / shard for shard in self.shards]


def load_shard_files(path: StoragePath) -> ShardFiles:
    """Read which files a manifest lists, without its columns; raises as ``load_manifest``."""
    with _named_errors(path):
        metadata = _metadata(path.read(pq.read_schema))
        shards, media = tuple(metadata["shards"]), int(metadata.get("media", 0))
        return _existing(ShardFiles(metadata["name"], path.parent, shards, media))


@contextmanager
def _named_errors(path: StoragePath) -> Iterator[None]:
    """Turn what goes wrong with a manifest into a line that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise RequestError(
            f"{path}: the tokenized data of this run is missing; restore data.cache, or choose another run.name"
        ) from None
    except RequestError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError):
        raise RequestError(
            f"{path}: the manifest of tokenized shards is damaged; delete {path.parent} to have it rebuilt"
        ) from None


def _existing(files: ShardFiles) -> ShardFiles:
    present = files.directory.entries()
    for shard in files.shards:
        if shard not in present:
            raise RequestError(f"{files.directory}: shard {shard} is missing; delete the folder to have it rebuilt")
    return files


def load_manifest(path: StoragePath, reused: bool = False) -> Manifest:
    """Read a manifest.

    Raises:
        RequestError: the manifest or one of its shards is missing or damaged.
    """
    with _named_errors(path):
        table = read_table(path, [name for name in path.read(pq.read_schema).names if name not in DIGEST])
        metadata = _metadata(table.schema)
        columns: dict[str, np.ndarray] = {}
        for name in table.column_names:
            columns[name] = (
                _shard_ends(table[name], len(metadata["shards"])) if name == "shard" else table[name].to_numpy()
            )
            table = table.drop_columns(name)  # so that no more than one column is in memory twice
        files = _existing(ShardFiles(metadata["name"], path.parent, tuple(metadata["shards"])))
        return Manifest(
            name=files.name,
            directory=files.directory,
            shards=files.shards,
            ends=columns["shard"],
            lengths=columns["length"],
            loss_tokens=columns["loss_tokens"],
            records=metadata["records"],
            rejected=tuple(Rejected(**item) for item in metadata["rejected"]),
            dropped=tuple(Rejected(**item) for item in metadata["dropped"]),
            counts=metadata["counts"],
            largest_token=tuple(metadata["largest_token"]),
            turns=Counter({TurnObservation(*turn): count for *turn, count in metadata["turns"]}),
            formats=tuple(metadata["formats"]),
            weights=columns.get("weight"),
            key=files.key,
            reused=reused,
            media=metadata.get("media", 0),
        )


def load_digests(path: StoragePath) -> np.ndarray:
    """[examples, 2] uint64 ``content_digest`` of a manifest's examples; raises as ``load_manifest``."""
    with _named_errors(path):
        table = read_table(path, DIGEST)
        return np.stack([table[name].to_numpy() for name in DIGEST], axis=1)


def _shard_ends(column: pa.ChunkedArray, shards: int) -> np.ndarray:
    """[shards] int64 index one past the last example of each shard.

    Args:
        column: [examples] index of the example's shard.
        shards: number of shards.
    """
    sizes = np.zeros(shards, np.int64)
    for chunk in column.chunks:
        sizes += np.bincount(chunk.to_numpy(), minlength=shards)
    return np.cumsum(sizes)
