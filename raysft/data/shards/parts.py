"""Shards of a set that is not complete yet. What the manifest will say of each is kept beside it until then, so that a command that
was stopped or killed tokenizes only the records that are missing when it starts again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from raysft.data.shards.manifest import Shard
from raysft.data.tokenization.turn_ends import TurnObservation
from raysft.data.types import Rejected
from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath

PREFIX = "part-"


def part_name(locations: Iterable[str]) -> str:
    """Name the file of a shard by where its records come from; the set's folder is named by what decides their tokens."""
    return f"{PREFIX}{hashlib.sha256(json.dumps(list(locations)).encode()).hexdigest()[:32]}.json"


def kept_parts(directory: StoragePath) -> frozenset[str]:
    """List the parts of a set."""
    return frozenset(name for name in directory.entries() if name.startswith(PREFIX))


def save_part(directory: StoragePath, name: str, shard: Shard) -> None:
    """Keep what is known of a shard that has been written."""
    content: dict[str, Any] = {
        **vars(shard),
        "bytes": (directory / shard.name).entry().size if shard.name else 0,
        "rejected": [asdict(item) for item in shard.rejected],
        "dropped": [asdict(item) for item in shard.dropped],
        "turns": [[*turn, count] for turn, count in shard.turns.items()],
        **{key: getattr(shard, key).tolist() for key in ("lengths", "loss_tokens", "weights")},
        "digests": shard.digests.tobytes().hex(),
    }
    (directory / name).write_text(json.dumps(content))


def load_part(directory: StoragePath, name: str) -> Shard | None:
    """Return what is known of a shard; None if it is not there as it was written."""
    try:
        content = json.loads((directory / name).read_text())
        size = content.pop("bytes")
        if content["name"] and (directory / content["name"]).entry().size != size:
            return None
        return Shard(
            **{
                **content,
                "lengths": np.array(content["lengths"], np.int32),
                "loss_tokens": np.array(content["loss_tokens"], np.int32),
                "weights": np.array(content["weights"], np.float32),
                "digests": np.frombuffer(bytes.fromhex(content["digests"]), np.uint64).reshape(-1, 2),
                "rejected": tuple(Rejected(**item) for item in content["rejected"]),
                "dropped": tuple(Rejected(**item) for item in content["dropped"]),
                "largest_token": tuple(content["largest_token"]),
                "turns": Counter({TurnObservation(*turn): count for *turn, count in content["turns"]}),
                "formats": tuple(content["formats"]),
                "columns": tuple(content["columns"]),
            }
        )
    except (OSError, StorageFailed, ValueError, KeyError, TypeError):
        return None


def remove_parts(directory: StoragePath) -> None:
    """Remove the parts of a set that is complete."""
    with suppress(OSError, StorageFailed):
        for name in kept_parts(directory):
            (directory / name).remove()
