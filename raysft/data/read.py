"""Files of any supported kind → examples of one shape (``records.Example``) with their source and position."""

from __future__ import annotations

import codecs
import csv
import fnmatch
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow import fs

from raysft.config import RequestError, Source
from raysft.records import Example, Message, Record, Rejected

FORMAT_OF_COLUMN = {
    "messages": "openai",
    "conversations": "sharegpt",
    "instruction": "alpaca",
    "turns": "turns",
    "text": "text",
}
FIELDS = {
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "turns": ("turns",),
    "text": ("text",),
}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    path: str
    """As shown to people: the path of the config, with globs resolved."""
    uri: str
    """Where pyarrow finds it."""
    size: int
    """Bytes."""
    identity: str
    """Hash of the content (local files), or of size and modification time (object stores)."""


def find_files(source: Source) -> list[DataFile]:
    """All files of a source, sorted within each of its paths.

    Raises:
        RequestError: a path matches no file, two match the same one, or a filesystem cannot be reached.
    """
    patterns = [source.path] if isinstance(source.path, str) else list(source.path)
    found: dict[str, DataFile] = {}
    for pattern in patterns:
        for file in _expand(pattern, source.name):
            if file.uri in found:
                raise RequestError(f"source {source.name!r}: {pattern} matches {file.path} a second time; name it once")
            found[file.uri] = file
    return list(found.values())


def _expand(pattern: str, name: str) -> Iterator[DataFile]:
    location = _inside_package(pattern, name) if pattern.startswith("package:") else pattern
    try:
        filesystem, path = _filesystem(location)
        infos = sorted(_matching(filesystem, path), key=lambda info: info.path)
        scheme = "" if isinstance(filesystem, fs.LocalFileSystem) else location.split("://")[0] + "://"
        files = [_data_file(info, scheme) for info in infos]
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RequestError(
            f"source {name!r}: {pattern} cannot be read ({reason}); check the path and its credentials"
        ) from None
    if not files:
        raise RequestError(f"source {name!r}: {pattern} matches no file; check data path and working directory")
    yield from files


def _data_file(info: Any, scheme: str) -> DataFile:
    uri = scheme + info.path
    if scheme:
        identity = hashlib.sha256(f"{uri} {info.size} {info.mtime_ns}".encode()).hexdigest()
    else:
        with open(info.path, "rb") as stream:
            identity = hashlib.file_digest(stream, "sha256").hexdigest()
    return DataFile(path=_shorten(uri), uri=uri, size=info.size or 0, identity=identity)


def _inside_package(pattern: str, name: str) -> str:
    """``package:NAME/GLOB`` → a path inside the installed package, found without importing it."""
    package, _, inner = pattern.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        raise RequestError(f"source {name!r}: {pattern}: Python package {package!r} is not installed; pip install it")
    return str(Path(spec.origin).parent / inner)


def _shorten(path: str) -> str:
    """A path as people know it: relative where it lies below the working directory or site-packages."""
    _, found, inner = path.partition("site-packages/")
    if found:
        return inner
    here = str(Path.cwd()) + "/"
    return path.removeprefix(here)


def _filesystem(location: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it."""
    if "://" in location:
        # A glob is no part of a URI that pyarrow accepts, so only the part before it is parsed.
        plain = re.split(r"[*?\[]", location)[0]
        filesystem, path = fs.FileSystem.from_uri(plain)
        return filesystem, path + location[len(plain) :]
    return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())


def _matching(filesystem: Any, path: str) -> Iterator[Any]:
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        yield info
    elif info.type == fs.FileType.Directory:
        for inner in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
            hidden = any(part.startswith((".", "_")) for part in inner.path[len(path) :].split("/"))
            if inner.type == fs.FileType.File and not hidden:
                yield inner
    elif re.search(r"[*?\[]", path):
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        for inner in filesystem.get_file_info(selector):
            if inner.type == fs.FileType.File and _fits(inner.path.split("/"), path.split("/")):
                yield inner


def _fits(parts: list[str], patterns: list[str]) -> bool:
    """Whether a path fits a glob, part by part; ``**`` stands for any number of folders, and no star for a leading dot."""
    if not patterns or not parts:
        return patterns == parts
    if patterns[0] == "**" and _fits(parts, patterns[1:]):
        return True
    if parts[0].startswith(".") and not patterns[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _fits(parts[1:], patterns[patterns[0] != "**" :])


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
            form = form or _detect(record, source)
            yield _to_example(record, form, source, where)
        except ValueError as error:
            yield Rejected(source.name, where, str(error))


def read_records(file: DataFile) -> Iterator[tuple[str, Record | str]]:
    """(position, record) for each record of a file; a string in place of the record says why it cannot be read."""
    name = file.path.lower().removesuffix(".gz")
    for endings, reader in READERS.items():
        if name.endswith(endings):
            filesystem, path = _filesystem(file.uri)
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


def _detect(record: Record, source: Source) -> str:
    """The format of a record, from its columns."""
    renamed = {field for field, column in source.columns.items() if column in record}
    for column, form in FORMAT_OF_COLUMN.items():
        if column in record or column in renamed:
            return form
    raise ValueError(
        f"no known format has the columns {', '.join(map(str, record)) or '(none)'}; "
        "name data.train[].format and data.train[].columns"
    )


def _to_example(record: Record, form: str, source: Source, where: str) -> Example:
    """One record as an example.

    Raises:
        ValueError: with the reason, where it cannot be used.
    """
    fields = {
        field: record.get(source.columns.get(field, field)) for field in (*FIELDS[form], "input", "system", "history")
    }
    for field in FIELDS[form]:
        if fields[field] is None:
            column = source.columns.get(field, field)
            state = "is null" if column in record else "is not there"
            raise ValueError(
                f"column {column!r} {state} (columns here: {', '.join(map(str, record))}); format {form} needs it, "
                "another name can be given in data.train[].columns"
            )
    if form == "text":
        text = _text(fields["text"], "text")
        if not text.strip():
            raise ValueError("the text is empty")
        return Example(source=source.name, record=where, text=text)
    messages = tuple(_messages(form, fields))
    _check(messages)
    return Example(source=source.name, record=where, messages=messages)


def _messages(form: str, fields: dict[str, Any]) -> Iterator[Message]:
    if form != "openai" and fields["system"]:
        yield Message("system", _text(fields["system"], "system"))
    if form == "alpaca":
        for index, pair in enumerate(_sequence(fields["history"], "history") if fields["history"] else []):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"history[{index}] holds {pair!r:.40}, a pair of question and answer belongs there")
            yield Message("user", _text(pair[0], "history"))
            yield Message("assistant", _text(pair[1], "history"))
        instruction, extra = _text(fields["instruction"], "instruction"), _text(fields["input"] or "", "input")
        yield Message("user", f"{instruction}\n{extra}" if extra else instruction)
        yield Message("assistant", _text(fields["output"], "output"))
    elif form == "turns":
        for index, turn in enumerate(_sequence(fields["turns"], "turns")):
            yield Message("assistant" if index % 2 else "user", _text(turn, f"turns[{index}]"))
    else:
        column, role_key, text_key, roles = {
            "sharegpt": ("conversations", "from", "value", SHAREGPT_ROLES),
            "openai": ("messages", "role", "content", OPENAI_ROLES),
        }[form]
        for index, turn in enumerate(_sequence(fields[column], column)):
            if not isinstance(turn, dict) or role_key not in turn or turn.get(text_key) is None:
                raise ValueError(f"{column}[{index}] needs {role_key!r} and {text_key!r}, it is {turn!r:.60}")
            if turn[role_key] not in list(roles):
                raise ValueError(f"{column}[{index}] has the role {turn[role_key]!r}; known: {', '.join(roles)}")
            yield Message(roles[turn[role_key]], _text(turn[text_key], f"{column}[{index}].{text_key}"))  # type: ignore[arg-type]


def _check(messages: tuple[Message, ...]) -> None:
    """A conversation has a question before its first answer, and an answer that is not empty."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn, so there is nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("the assistant speaks before any user turn")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise ValueError(f"turn {index} of the assistant is empty")


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{field} holds {value!r:.40}, a text belongs there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} holds half a character ({value[error.start]!r}), which no tokenizer takes") from None
    return value


def _sequence(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} holds {value!r:.40}, a list of turns belongs there")
    return value


def opening(example: Example) -> str:
    """The words that decide on which side of the hold-out an example falls: its first user turn, or the whole text.

    Case, punctuation and spaces do not count, so that near copies stay together.
    """
    text = next((message.content for message in example.messages if message.role == "user"), example.text)
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def is_held_out(example: Example, share: float) -> bool:
    """Whether a stable hash of the opening puts an example into the held-out share."""
    digest = hashlib.sha256(opening(example).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
