"""Paths, globs, folders and URIs of a source → its files."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from raysft.config import Source, locate
from raysft.errors import RequestError, StorageFailed
from raysft.storage import hub
from raysft.storage.filesystems import filesystem_of, options_of, quoted
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for

DOCUMENTATION_PREFIXES = ("README", "LICENSE", "LICENCE")
"""How files begin that stand in a folder about its data. Other files of no known kind are refused: they might be data."""
DATASETS_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""A registry, and what ``datasets`` writes about a set beside its files; with it a ``state.json``."""
SPLITS_METADATA = "dataset_dict.json"
"""What ``datasets`` writes beside the folders of several splits."""


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    path: str
    """As shown to people: the path of the config, with globs resolved."""
    uri: str
    """Where pyarrow finds it."""
    size: int
    """Bytes."""
    modified: int | None
    """Nanoseconds of its modification time, where the filesystem knows it."""
    identity: str
    """Hash of the content (local files), or of size and modification time (object stores)."""

    def has_changed(self) -> bool:
        """Whether somebody wrote to it since it was found."""
        filesystem, path = filesystem_of(self.uri)
        info = filesystem.get_file_info(path)
        return (info.size or 0, info.mtime_ns) != (self.size, self.modified)


def find_files(source: Source) -> list[DataFile]:
    """All files of a source that has a path, sorted within each of its paths.

    Raises:
        RequestError: a path matches no file, two match the same one, or a filesystem cannot be reached.
    """
    patterns = [source.path] if isinstance(source.path, str) else list(source.path or ())
    found: dict[str, DataFile] = {}
    for pattern in patterns:
        for file in _expand(pattern, source.name):
            place = file.uri if "://" in file.uri else os.path.realpath(file.uri)
            if place in found:
                raise RequestError(f"source {source.name!r}: {pattern} matches {file.path} a second time; name it once")
            found[place] = file
    return list(found.values())


def _expand(pattern: str, name: str) -> Iterator[DataFile]:
    location = locate(pattern, f"source {name!r}")
    if location.startswith("file://"):
        location = unquote(urlsplit(location).path)
    try:
        infos = sorted(_found(location), key=lambda info: (info.path.count("/"), info.path))
        if "://" not in location:
            infos = _without_symlink_duplicates(infos)
        infos.sort(key=lambda info: info.path)
        files = [_data_file(info, location if "://" in location else "") for info in infos]
    except RequestError:
        raise
    except StorageFailed as error:
        raise RequestError(f"source {name!r}: {error}; check the path and its credentials") from None
    except (*hub.failures(), pa.ArrowException) as error:
        fault = (hub.reason_of(error) or hub.NONSENSE) if location.startswith("hf://") else None
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(
            f"source {name!r}: {pattern} cannot be read: {fault}"
            if fault
            else f"source {name!r}: {pattern} cannot be read ({reason:.200}); check the path and its credentials"
        ) from None
    if not files:
        raise RequestError(f"source {name!r}: {pattern} matches no file; check data path and working directory")
    yield from files


def _found(location: str) -> list[Any]:
    if "://" not in location or location.startswith("hf://"):  # the hub is asked with a patience of its own
        return list(_matching(*filesystem_of(location)))
    with retry_for(FIRST_SECONDS):
        return StoragePath.of(location).with_retries(lambda filesystem, path: list(_matching(filesystem, path)))


def _without_symlink_duplicates(infos: list[Any]) -> list[Any]:
    """Each file once, by its shortest path: a link may lead back into its own folder."""
    found: dict[str, Any] = {}
    for info in infos:
        found.setdefault(os.path.realpath(info.path), info)
    return list(found.values())


def _data_file(info: Any, location: str) -> DataFile:
    """The file that was found; ``location`` is the URI by which it was, empty for a local one."""
    scheme, _, rest = location.partition("://")
    shown = f"{scheme}://{info.path}" if location else _display_path(info.path)
    if location:
        # pyarrow's paths begin with the bucket; on HDFS the host is no part of them.
        host = rest.split("/")[0] + "/" if scheme in ("hdfs", "viewfs") else ""
        uri = f"{scheme}://{host}{quoted(info.path.lstrip('/'))}{options_of(rest)}"
        identity = hashlib.sha256(f"{shown} {info.size} {info.mtime_ns}".encode()).hexdigest()
    else:
        uri = info.path
        with open(info.path, "rb") as stream:
            identity = hashlib.file_digest(stream, "sha256").hexdigest()
    return DataFile(path=shown, uri=uri, size=info.size or 0, modified=info.mtime_ns, identity=identity)


def _display_path(path: str) -> str:
    """A path as people know it: relative where it lies below the working directory or site-packages."""
    _, found, inner = path.partition("site-packages/")
    if found:
        return inner
    here = str(Path.cwd()) + "/"
    return path.removeprefix(here)


def _matching(filesystem: Any, path: str) -> Iterator[Any]:
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        yield info
    elif info.type == fs.FileType.Directory:
        inside = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        described = _datasets_folders(inside)
        _refuse_splits(inside, described)
        for inner in inside:
            hidden = any(part.startswith((".", "_")) for part in inner.path[len(path) :].split("/"))
            about = inner.base_name.upper().startswith(DOCUMENTATION_PREFIXES) or inner.base_name in DATASETS_METADATA
            about |= inner.base_name == "state.json" and _folder(inner) in described
            if inner.type == fs.FileType.File and not hidden and not about and not _is_datasets_cache(inner, described):
                yield inner
    elif re.search(r"[*?\[]", path):
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        inside = filesystem.get_file_info(selector)
        described = _datasets_folders(inside)
        for inner in inside:
            fits = inner.type == fs.FileType.File and _matches_glob(inner.path.split("/"), path.split("/"))
            if fits and not _is_datasets_cache(inner, described):
                yield inner


def _folder(info: Any) -> str:
    return info.path.rpartition("/")[0]


def _datasets_folders(infos: list[Any]) -> set[str]:
    """The folders that ``datasets`` has described."""
    return {_folder(info) for info in infos if info.base_name in DATASETS_METADATA}


def _is_datasets_cache(info: Any, described: set[str]) -> bool:
    """Whether a file is what ``map`` or ``filter`` of ``datasets`` made of a set and left beside it: the same records again."""
    return info.base_name.startswith("cache-") and info.base_name.endswith(".arrow") and _folder(info) in described


def _refuse_splits(infos: list[Any], described: set[str]) -> None:
    """A set that was saved with its splits is not trained on as a whole: one of them is there to test with."""
    for whole in (_folder(info) for info in infos if info.base_name == SPLITS_METADATA):
        splits = sorted(folder for folder in described if folder.rpartition("/")[0] == whole)
        if len(splits) > 1:
            names = ", ".join(split.rpartition("/")[2] for split in splits)
            one = next((split for split in splits if split.endswith("/train")), splits[0])
            raise RequestError(
                f"{_display_path(whole)}: holds the splits {names}; "
                f"name the folder of one, such as {_display_path(one)}, or a list of several"
            )


def _matches_glob(parts: list[str], patterns: list[str]) -> bool:
    """Whether a path fits a glob, part by part; ``**`` stands for any number of folders, and no star for a leading dot."""
    if not patterns or not parts:
        return patterns == parts
    if patterns == ["**"]:
        return not any(part.startswith(".") for part in parts)
    if patterns[0] == "**" and _matches_glob(parts, patterns[1:]):
        return True
    if parts[0].startswith(".") and not patterns[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches_glob(parts[1:], patterns[patterns[0] != "**" :])
