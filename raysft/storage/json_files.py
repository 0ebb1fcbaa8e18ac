"""JSON and text files that may be read while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysft.storage.path import StoragePath


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content, never a part."""
    # Bad data may hold unpaired surrogates; they are written as JSON's escapes.
    StoragePath.of(path).write_bytes(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with indent 4 and sorted keys, atomically."""
    write_atomically(path, json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically, not ASCII-escaped; rows are taken one at a time."""

    def write(stream: Any) -> None:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False) + "\n"
            stream.write(line.encode("utf-8", errors="backslashreplace"))  # as in ``write_atomically``

    StoragePath.of(path).write(write)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object per line; skip an incomplete last line, which a killed writer leaves."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def flat(record: Any) -> dict[str, Any]:
    """Return a dataclass as a JSON object."""
    return asdict(record)
