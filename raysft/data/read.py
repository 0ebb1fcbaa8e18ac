"""Files of any supported kind → examples of one shape (``records.Example``) with their source and position."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raysft.config import RequestError, Source
from raysft.data.files import DataFile, filesystem_of
from raysft.data.formats import detect_format, to_example
from raysft.records import Example, Record, Rejected


def read(file: DataFile, source: Source) -> Iterator[Example | Rejected]:
    """Examples of one file in their order; what cannot be used comes as ``Rejected`` with its position.

    Raises:
        RequestError: the file as a whole is unreadable, or of no known kind.
    """
    form = source.format
    for position, record in read_records(file):
        where = f"{file.path}:{position}"
        if isinstance(record, str):
            yield Rejected(source.name, where, record)
            continue
        try:
            form = form or detect_format(record, source)
            yield to_example(record, form, source, where)
        except ValueError as error:
            yield Rejected(source.name, where, str(error))


def read_records(file: DataFile) -> Iterator[tuple[str, Record | str]]:
    """(position, record) for each record of a file; a string in place of the record says why it cannot be read."""
    name = file.path.lower().removesuffix(".gz")
    for endings, reader in READERS.items():
        if name.endswith(endings):
            filesystem, path = filesystem_of(file.uri)
            try:
                with filesystem.open_input_stream(path, compression="detect") as stream:
                    yield from reader(stream, file.path)
            except (OSError, pa.ArrowException) as error:
                raise RequestError(
                    f"{file.path}: cannot be read ({str(error).splitlines()[0]}); write the file again"
                ) from None
            return
    known = " ".join(ending for endings in READERS for ending in endings)
    raise RequestError(f"{file.path}: unknown kind of file; known endings: {known}")


def _read_json_lines(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    return _records_of_lines(stream, _parse_json)


def _read_text(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    return _records_of_lines(stream, lambda text: {"text": text})


def _records_of_lines(stream: Any, parse: Callable[[str], Record | str]) -> Iterator[tuple[str, Record | str]]:
    for number, line in enumerate(_lines(stream), 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield str(number), f"is not UTF-8 text (byte {line[error.start]:#x})"
            continue
        if text.strip():
            yield str(number), parse(text)


def _parse_json(text: str) -> Record | str:
    try:
        return _as_record(json.loads(text))
    except json.JSONDecodeError as error:
        return f"no valid JSON ({error.msg} at column {error.colno}): {text.strip()[:40]!r}"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return f"no usable JSON ({str(error).splitlines()[0]}): {text.strip()[:40]!r}"


def _read_json(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    content = stream.read()
    if content.removeprefix(codecs.BOM_UTF8).lstrip()[:1] != b"[":
        yield from _read_json_lines(pa.BufferReader(content), path)
        return
    text = _decode(content, path)
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()
        raise RequestError(
            f"{path}:{error.lineno}: no valid JSON ({error.msg} at column {error.colno}): {line[:40]!r}; mend the file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: no usable JSON ({str(error).splitlines()[0]}); mend the file") from None
    for index, item in enumerate(items):
        yield f"[{index}]", _as_record(item)


def _read_csv(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    # The module's own limit of 128 KiB is short of a long document.
    csv.field_size_limit(sys.maxsize)
    lines = (_decode(line, path, before) + "\n" for before, line in enumerate(_lines(stream)))
    reader = csv.reader(lines, strict=True)
    begin = 1
    try:
        columns = next(reader, [])
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise RequestError(f"{path}:1: two columns are named {twice[0]!r}; give each its own name")
        begin = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(columns):
                yield str(begin), f"has {len(row)} columns and the header line has {len(columns)}"
            elif row:
                yield str(begin), dict(zip(columns, row, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise RequestError(f"{path}:{begin}: no valid CSV ({error}); mend this record") from None


def _read_arrow(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    try:
        if path.lower().removesuffix(".gz").endswith(".parquet"):
            batches = pq.ParquetFile(pa.BufferReader(stream.read())).iter_batches(batch_size=1000)
        else:
            data = pa.BufferReader(stream.read())
            try:
                table = pa.ipc.open_file(data).read_all()
            except pa.ArrowInvalid:
                data.seek(0)
                table = pa.ipc.open_stream(data).read_all()
            batches = table.to_batches(max_chunksize=1000)
        index = 0
        for batch in batches:
            for record in batch.to_pylist():
                yield f"[{index}]", record
                index += 1
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write the file again") from None


def _read_yaml(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    """A list of records, or a mapping whose ``conversations`` is that list (as chatterbot-corpus has it)."""
    loader = yaml.CSafeLoader(_decode(stream.read(), path))
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            nested = [value for key, value in root.value if key.value == "conversations"]
            root = nested[0] if nested else root
        if not isinstance(root, yaml.SequenceNode):
            raise RequestError(f"{path}: a YAML data file is a list, or has a list under 'conversations'")
        for node in root.value:
            yield str(node.start_mark.line + 1), _yaml_record(loader, node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(f"{path}{line}: no valid YAML ({reason}); mend the file") from None
    finally:
        loader.dispose()


def _yaml_record(loader: Any, node: yaml.Node) -> Record | str:
    try:
        return _as_record(loader.construct_document(node))
    except yaml.YAMLError as error:
        return f"no usable YAML ({getattr(error, 'problem', None) or error})"
    except ValueError as error:  # 2020-99-99 is taken for a date
        return f"no usable YAML ({error})"


READERS = {
    (".jsonl", ".ndjson"): _read_json_lines,
    (".json",): _read_json,
    (".txt",): _read_text,
    (".csv",): _read_csv,
    (".parquet", ".arrow"): _read_arrow,
    (".yml", ".yaml"): _read_yaml,
}


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines split at \\n (and \\r\\n) alone: characters such as U+2028 do not end a line of JSON."""
    rest = b""
    mark = codecs.BOM_UTF8
    while chunk := stream.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removeprefix(mark).removesuffix(b"\r")
            mark = b""
    if rest:
        yield rest.removeprefix(mark).removesuffix(b"\r")


def _decode(content: bytes, path: str, lines_before: int = 0) -> str:
    """UTF-8 with or without a byte order mark, of a file that is of no use when a part of it is something else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        raise RequestError(
            f"{path}:{line}: is not UTF-8 text (byte {content[error.start]:#x}); write the file again"
        ) from None


def _as_record(item: Any) -> Record | str:
    if isinstance(item, dict):
        return item
    if isinstance(item, list):
        return {"turns": item}
    return f"a record is a mapping or a list of turns, this is {item!r:.40}"
