"""Paths, globs, folders and URIs of a source → its files."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from raysft.config import RequestError, Source, locate


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
    location = locate(pattern, f"source {name!r}")
    try:
        filesystem, path = filesystem_of(location)
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


def _shorten(path: str) -> str:
    """A path as people know it: relative where it lies below the working directory or site-packages."""
    _, found, inner = path.partition("site-packages/")
    if found:
        return inner
    here = str(Path.cwd()) + "/"
    return path.removeprefix(here)


def filesystem_of(location: str) -> tuple[Any, str]:
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
