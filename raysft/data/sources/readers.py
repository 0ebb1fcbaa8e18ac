"""Stream the records of a data file, with their positions, without holding the whole file in memory (except YAML)."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import pyarrow as pa
import yaml

from raysft.data.sources.arrow import arrow_records, parquet_records
from raysft.data.sources.files import DataFile
from raysft.data.sources.json_stream import JSON, READ_BYTES, Unreadable, json_list
from raysft.data.types import Record
from raysft.errors import RequestError, one_line
from raysft.storage.filesystems import filesystem_of
from raysft.storage.retry import reason_of

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""File ending → compression, as pyarrow names it."""


@dataclass(frozen=True)
class JsonLine:
    """A record that the tokenizing task parses, so that reading stays fast."""

    line: bytes


RawRecord = Record | JsonLine | Unreadable
PositionedRecords = Iterator[tuple[str, int, RawRecord]]
"""(position in the file, approximate bytes, record)."""


def read_raw(file: DataFile) -> PositionedRecords:
    """Read the records of a file in order, parsed only as far as needed to separate them.

    Raises:
        RequestError: the file is unreadable as a whole, of an unknown kind, or was changed since it was found.
    """
    name = file.path.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    reader = next((reader for endings, reader in READERS.items() if name.endswith(endings)), None)
    if reader is None:
        known = " ".join(ending for endings in READERS for ending in endings)
        raise RequestError(
            f"{file.path}: unknown kind of file; convert it, or set path to files that end with one of: {known} "
            f"(each also with {' '.join(COMPRESSIONS)})"
        )
    try:
        yield from reader(file)
        changed = file.has_changed()
    except RecursionError:
        raise RequestError(f"{file.path}: is nested too deeply; correct the file") from None
    except (OSError, pa.ArrowException, EOFError) as error:
        remedy = "check the storage, or write the file again" if "://" in file.uri else "write the file again"
        raise RequestError(f"{file.path}: cannot be read ({reason_of(error)}); {remedy}") from None
    if changed:
        raise RequestError(f"{file.path}: changed while it was being read; run again when nothing is writing to it")


def parse_record(raw: RawRecord) -> Record | Unreadable:
    """Parse a record, if that is still to be done."""
    if not isinstance(raw, JsonLine):
        return raw
    try:
        text = raw.line.decode()
    except UnicodeDecodeError as error:
        return Unreadable(f"is not UTF-8 text (byte {raw.line[error.start]:#x})")
    try:
        return _as_record(JSON.decode(text))
    except json.JSONDecodeError as error:
        return Unreadable(f"invalid JSON ({error.msg} at column {error.colno}): {text.strip()[:40]!r}")
    except (ValueError, RecursionError) as error:
        # Duplicate keys, numbers with thousands of digits, thousands of brackets.
        return Unreadable(f"unusable JSON ({one_line(error)}): {text.strip()[:40]!r}")


def _json_lines(file: DataFile) -> PositionedRecords:
    with _stream(file) as stream:
        yield from _lines_of_json(stream)


def _lines_of_json(stream: Any, start: bytes = b"") -> PositionedRecords:
    for number, line in enumerate(_lines(stream, start), 1):
        if line.strip():
            yield str(number), len(line), JsonLine(line)


def _text(file: DataFile) -> PositionedRecords:
    with _stream(file) as stream:
        for number, line in enumerate(_lines(stream), 1):
            if not line.strip():
                continue
            try:
                yield str(number), len(line), {"text": line.decode()}
            except UnicodeDecodeError as error:
                yield str(number), len(line), Unreadable(f"is not UTF-8 text (byte {line[error.start]:#x})")


def _json(file: DataFile) -> PositionedRecords:
    """Read a list of records incrementally, or one record per line."""
    with _stream(file) as stream:
        start = stream.read(READ_BYTES)
        while start and not start.removeprefix(codecs.BOM_UTF8).strip() and (more := stream.read(READ_BYTES)):
            start += more
        if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            for index, size, item in json_list(stream, start.removeprefix(codecs.BOM_UTF8), file.path):
                yield f"[{index}]", size, item if isinstance(item, Unreadable) else _as_record(item)
        elif start.removeprefix(codecs.BOM_UTF8).split(maxsplit=1)[:1] == [b"{"] and b"\n" in start:
            raise RequestError(
                f"{file.path}: must be a JSON list of records or have one record per line, but starts with an object over "
                "several lines; convert the file"
            )
        else:
            yield from _lines_of_json(stream, start)


def _csv(file: DataFile) -> PositionedRecords:
    # The default limit of 128 KiB is too small for long documents.
    csv.field_size_limit(sys.maxsize)
    with _stream(file) as stream:
        lines = (_decode(line, file.path, before) for before, line in enumerate(_lines(stream, ends=True)))
        reader = csv.reader(lines, strict=True)
        first_line = 1
        try:
            columns = next(reader, [])
            duplicates = [column for column in columns if columns.count(column) > 1]
            if duplicates:
                raise RequestError(f"{file.path}:1: two columns are named {duplicates[0]!r}; rename one of them")
            first_line = reader.line_num + 1
            for row in reader:
                size = sum(map(len, row))
                if row and len(row) != len(columns):
                    reason = f"has {len(row)} columns, but the header has {len(columns)}"
                    yield str(first_line), size, Unreadable(reason)
                elif row:
                    yield str(first_line), size, dict(zip(columns, row, strict=True))
                first_line = reader.line_num + 1
        except csv.Error as error:
            raise RequestError(
                f"{file.path}:{first_line}: invalid CSV ({one_line(error)}); correct the record"
            ) from None


def _parquet(file: DataFile) -> PositionedRecords:
    with _seekable(file) as source:
        for index, size, record in parquet_records(source):
            yield f"[{index}]", size, record


def _arrow(file: DataFile) -> PositionedRecords:
    with _seekable(file) as source:
        for index, size, record in arrow_records(source):
            yield f"[{index}]", size, record


class _Loader(yaml.CSafeLoader):
    """Loads 2024-07-26 as text, as JSON does: chat templates cannot write dates."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
    }


def _yaml(file: DataFile) -> PositionedRecords:
    """Read a list of records, or a mapping with that list under ``conversations`` (as in chatterbot-corpus)."""
    with _stream(file) as stream:
        loader = _Loader(_decode(stream.read().removeprefix(codecs.BOM_UTF8), file.path))
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            nested = [value for key, value in root.value if key.value == "conversations"]
            root = nested[0] if nested else root
        if not isinstance(root, yaml.SequenceNode):
            raise RequestError(
                f"{file.path}: must be a list of records, or have one under 'conversations'; correct the file"
            )
        for node in root.value:
            size = node.end_mark.index - node.start_mark.index
            yield str(node.start_mark.line + 1), size, _yaml_record(loader, node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or one_line(error)
        raise RequestError(f"{file.path}{line}: invalid YAML ({reason}); correct the file") from None
    finally:
        loader.dispose()


def _yaml_record(loader: Any, node: yaml.Node) -> Record | Unreadable:
    try:
        return _as_record(loader.construct_document(node))
    except yaml.YAMLError as error:
        return Unreadable(f"unusable YAML ({getattr(error, 'problem', None) or one_line(error)})")
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # such as !!int x
        return Unreadable(f"unusable YAML ({one_line(error)})")


READERS: dict[tuple[str, ...], Callable[[DataFile], PositionedRecords]] = {
    (".jsonl", ".ndjson"): _json_lines,
    (".json",): _json,
    (".txt",): _text,
    (".csv",): _csv,
    (".parquet",): _parquet,
    (".arrow",): _arrow,
    (".yml", ".yaml"): _yaml,
}


@contextmanager
def _stream(file: DataFile) -> Iterator[Any]:
    filesystem, path = filesystem_of(file.uri)
    ending = next((kind for kind in COMPRESSIONS if file.path.lower().endswith(kind)), None)
    with filesystem.open_input_stream(path, compression=COMPRESSIONS[ending] if ending else None) as stream:
        yield stream


@contextmanager
def _seekable(file: DataFile) -> Iterator[Any]:
    """Open a file for random access; a compressed file is decompressed into memory first."""
    if file.path.lower().endswith(tuple(COMPRESSIONS)):
        with _stream(file) as stream:
            yield pa.BufferReader(stream.read())
    else:
        filesystem, path = filesystem_of(file.uri)
        with filesystem.open_input_file(path) as source:
            yield source


def _lines(stream: Any, start: bytes = b"", ends: bool = False) -> Iterator[bytes]:
    """Split at \\n and \\r\\n only, as characters such as U+2028 do not end a line of JSON. With ``ends`` line ends are kept."""
    mark = codecs.BOM_UTF8
    fragments: list[bytes] = []
    for chunk in chain([start], iter(lambda: stream.read(READ_BYTES), b"")):
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*fragments, lines[0]])  # join a long line once, at its end
            fragments = []
        fragments.append(rest)
        for line in lines:
            yield line.removeprefix(mark) + b"\n" if ends else line.removeprefix(mark).removesuffix(b"\r")
            mark = b""
    if last := b"".join(fragments).removeprefix(mark):
        yield last if ends else last.removesuffix(b"\r")


def _decode(content: bytes, path: str, lines_before: int = 0) -> str:
    """Decode UTF-8 of a file that cannot be read in parts.

    Raises:
        RequestError: the content is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}:{line}: is not UTF-8 text (byte {content[error.start]:#x}); save the file as UTF-8"
        ) from None


def _as_record(item: Any) -> Record | Unreadable:
    if isinstance(item, dict):
        return item
    if isinstance(item, list):
        return {"turns": item}
    return Unreadable(f"a record must be a mapping or a list of turns, but is {item!r:.40}")
