"""Files of any supported kind → examples of one shape (``records.Example``) with their source and position."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
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
        RequestError: a path matches no file, or its filesystem cannot be reached.
    """
    patterns = [source.path] if isinstance(source.path, str) else list(source.path)
    files = [file for pattern in patterns for file in _expand(pattern, source.name)]
    if not files:
        raise RequestError(f"source {source.name!r}: data path is an empty list; name at least one file")
    return files


def _expand(pattern: str, name: str) -> Iterator[DataFile]:
    location = _inside_package(pattern, name) if pattern.startswith("package:") else pattern
    try:
        filesystem, path = _filesystem(location)
        infos = list(_matching(filesystem, path))
    except (OSError, pa.ArrowException) as error:
        raise RequestError(
            f"source {name!r}: {pattern} cannot be read ({error}); check the path and its credentials"
        ) from None
    if not infos:
        raise RequestError(f"source {name!r}: {pattern} matches no file; check data path and working directory")
    local = isinstance(filesystem, fs.LocalFileSystem)
    for info in sorted(infos, key=lambda info: info.path):
        uri = info.path if local else f"{location.split('://')[0]}://{info.path}"
        shown = info.path if local else uri
        if not local:
            identity = hashlib.sha256(f"{uri} {info.size} {info.mtime_ns}".encode()).hexdigest()
        else:
            with open(info.path, "rb") as stream:
                identity = hashlib.file_digest(stream, "sha256").hexdigest()
        yield DataFile(path=_shorten(shown), uri=uri, size=info.size or 0, identity=identity)


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
    if re.search(r"[*?\[]", path):
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        depth = path.count("/")
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            same_depth = "**" in path or info.path.count("/") == depth
            if info.type == fs.FileType.File and same_depth and fnmatch.fnmatch(info.path, path):
                yield info
        return
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        yield info
    elif info.type == fs.FileType.Directory:
        for inner in filesystem.get_file_info(fs.FileSelector(path, recursive=True)):
            hidden = any(part.startswith((".", "_")) for part in inner.path[len(path) :].split("/"))
            if inner.type == fs.FileType.File and not hidden:
                yield inner


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
    name = file.path.removesuffix(".gz")
    for endings, reader in READERS.items():
        if name.endswith(endings):
            filesystem, path = _filesystem(file.uri)
            with filesystem.open_input_stream(path, compression="detect") as stream:
                try:
                    yield from reader(stream, file.path)
                except UnicodeDecodeError as error:
                    raise RequestError(
                        f"{file.path}: is not UTF-8 text ({error.reason} at byte {error.start})"
                    ) from None
            return
    known = " ".join(ending for endings in READERS for ending in endings)
    raise RequestError(f"{file.path}: unknown kind of file; known endings: {known}")


def _read_json_lines(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        try:
            yield str(number), _as_record(json.loads(line))
        except json.JSONDecodeError as error:
            yield str(number), f"no valid JSON ({error.msg} at column {error.colno}): {line.strip()[:40]!r}"


def _read_json(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    text = stream.read().decode("utf-8-sig")
    if text.lstrip()[:1] != "[":
        yield from _read_json_lines(pa.BufferReader(text.encode()), path)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text else ""
        raise RequestError(
            f"{path}:{error.lineno}: no valid JSON ({error.msg} at column {error.colno}): {line.strip()[:40]!r}; mend the file"
        ) from None
    for index, item in enumerate(items):
        yield f"[{index}]", _as_record(item)


def _read_text(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    for number, line in enumerate(_lines(stream), 1):
        if line.strip():
            yield str(number), {"text": line}


def _read_csv(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    reader = csv.DictReader(_lines(stream, keep_ends=True))
    for row in reader:
        if None in row or None in row.values():
            yield str(reader.line_num), f"has not the {len(reader.fieldnames or [])} columns of the header line"
        else:
            yield str(reader.line_num), dict(row)


def _read_arrow(stream: Any, path: str) -> Iterator[tuple[str, Record | str]]:
    try:
        if path.endswith(".parquet"):
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
    loader = yaml.CSafeLoader(stream.read().decode("utf-8-sig"))
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            nested = [value for key, value in root.value if key.value == "conversations"]
            root = nested[0] if nested else root
        if not isinstance(root, yaml.SequenceNode):
            raise RequestError(f"{path}: a YAML data file is a list, or has a list under 'conversations'")
        for node in root.value:
            yield str(node.start_mark.line + 1), _as_record(loader.construct_document(node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RequestError(f"{path}{line}: no valid YAML ({getattr(error, 'problem', error)}); mend the file") from None
    finally:
        loader.dispose()


READERS = {
    (".jsonl", ".ndjson"): _read_json_lines,
    (".json",): _read_json,
    (".txt",): _read_text,
    (".csv",): _read_csv,
    (".parquet", ".arrow"): _read_arrow,
    (".yml", ".yaml"): _read_yaml,
}


def _lines(stream: Any, keep_ends: bool = False) -> Iterator[str]:
    """Lines split at \\n (and \\r\\n) alone: characters such as U+2028 do not end a line of JSON."""
    rest = b""
    first = True
    while chunk := stream.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            text = line.decode("utf-8-sig" if first else "utf-8")
            first = False
            yield text + "\n" if keep_ends else text.removesuffix("\r")
    if rest:
        yield rest.decode("utf-8-sig" if first else "utf-8").removesuffix("\r")


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
        for pair in fields["history"] or []:
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
            if turn[role_key] not in roles:
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
