"""JSON and text files that others may read while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    # Half a character, as bad data holds it, is written as the escape that JSON has for it.
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    draft.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with indent 4 and sorted keys, atomically."""
    write_atomically(path, json.dumps(value, indent=4, sort_keys=True, ensure_ascii=False) + "\n")


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically, not ASCII-escaped."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read one JSON object a line; a torn last line, as a killed writer leaves it, is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def flat(record: Any) -> dict[str, Any]:
    """A dataclass as a JSON object."""
    return asdict(record)
