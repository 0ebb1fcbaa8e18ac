"""Find the files of a source from its paths, globs, folders and URIs."""

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
from raysft.errors import RequestError, StorageFailed, one_line, unreadable
from raysft.storage import hub
from raysft.storage.filesystems import filesystem_of, options_of, quoted
from raysft.storage.hub_snapshots import pin_dataset
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for

DOCUMENTATION_PREFIXES = ("README", "LICENSE", "LICENCE")
"""Prefixes of documentation files, which are skipped. Other files of an unknown kind are refused: they might be data."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Endings of images, which may lie next to the records that name them."""
DATASETS_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""A registry, and the metadata files that ``datasets`` saves next to its data, along with a ``state.json``."""
SPLITS_METADATA = "dataset_dict.json"
"""The file that ``datasets`` saves next to the folders of several splits."""


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    path: str
    """Path for messages: as in the config, with globs resolved."""
    uri: str
    """Path or URI for pyarrow."""
    size: int
    """Bytes."""
    modified: int | None
    """Modification time in nanoseconds, if the filesystem knows it."""
    identity: str
    """Hash of the content (local files), or of path, size and modification time (object stores)."""

    def has_changed(self) -> bool:
        """True if the file was written to since it was found."""
        filesystem, path = filesystem_of(self.uri)
        info = filesystem.get_file_info(path)
        return (info.size or 0, info.mtime_ns) != (self.size, self.modified)


def find_files(source: Source) -> list[DataFile]:
    """Find all files of a source that has a path; the files of each path are sorted.

    Raises:
        RequestError: a path matches no file, two paths match the same file, or a filesystem cannot be read.
    """
    patterns = [source.path] if isinstance(source.path, str) else list(source.path or ())
    files: dict[str, DataFile] = {}
    for pattern in patterns:
        for file in _expand(pattern, source.name):
            location = file.uri if "://" in file.uri else os.path.realpath(file.uri)
            if location in files:
                raise RequestError(
                    f"source {source.name!r}: {pattern} matches {file.path}, but an earlier path does too; remove one of them"
                )
            files[location] = file
    return list(files.values())


def _expand(pattern: str, name: str) -> Iterator[DataFile]:
    location = locate(pattern, f"source {name!r}")
    if location.startswith("file://"):
        location = unquote(urlsplit(location).path)
    try:
        # The commit stands for the content: sizes may stay, and the hub gives no times.
        location = pin_dataset(location) if location.startswith("hf://") else location
        infos = sorted(_list_files(location), key=lambda info: (info.path.count("/"), info.path))
        if "://" not in location:
            infos = _without_symlink_duplicates(infos)
        infos.sort(key=lambda info: info.path)
        files = [_data_file(info, location if "://" in location else "") for info in infos]
    except RequestError:
        raise
    except StorageFailed as error:
        raise unreadable(f"source {name!r}: {error}; check the path and its credentials", error) from None
    except (*hub.error_types(), pa.ArrowException) as error:
        if location.startswith("hf://"):
            advice = hub.reason_of(error) or hub.UNUSABLE
            raise RequestError(f"source {name!r}: {pattern} cannot be read: {advice}") from None
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RequestError(
            f"source {name!r}: {pattern} cannot be read ({reason}); check the path and its credentials"
        ) from None
    if not files:
        raise RequestError(f"source {name!r}: {pattern} matches no file; check the path and the working directory")
    yield from files


def _list_files(location: str) -> list[Any]:
    if "://" not in location or location.startswith(("hf://", "ms://")):  # requests to hubs have their own retries
        return list(_matching(*filesystem_of(location)))
    with retry_for(FIRST_SECONDS):
        return StoragePath.of(location).with_retries(lambda filesystem, path: list(_matching(filesystem, path)))


def _without_symlink_duplicates(infos: list[Any]) -> list[Any]:
    """Keep each file once, by its shortest path: a symbolic link may lead back into its own folder."""
    by_real_path: dict[str, Any] = {}
    for info in infos:
        by_real_path.setdefault(os.path.realpath(info.path), info)
    return list(by_real_path.values())


def _data_file(info: Any, location: str) -> DataFile:
    """Describe a file that was found under ``location``, a URI; empty for a local file."""
    scheme, _, rest = location.partition("://")
    shown = f"{scheme}://{info.path}" if location else _display_path(info.path)
    if location:
        # pyarrow's paths start with the bucket, but on HDFS they leave out the host.
        host = rest.split("/")[0] + "/" if scheme in ("hdfs", "viewfs") else ""
        uri = f"{scheme}://{host}{quoted(info.path.lstrip('/'))}{options_of(rest)}"
        identity = hashlib.sha256(f"{shown} {info.size} {info.mtime_ns}".encode()).hexdigest()
    else:
        uri = info.path
        with open(info.path, "rb") as stream:
            identity = hashlib.file_digest(stream, "sha256").hexdigest()
    return DataFile(path=shown, uri=uri, size=info.size or 0, modified=info.mtime_ns, identity=identity)


def _display_path(path: str) -> str:
    """Path for messages: relative if it lies in the working directory or in site-packages."""
    _, separator, in_package = path.partition("site-packages/")
    return in_package if separator else path.removeprefix(f"{Path.cwd()}/")


def _matching(filesystem: Any, path: str) -> Iterator[Any]:
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.File:
        yield info
    elif info.type == fs.FileType.Directory:
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
        dataset_folders = _datasets_folders(infos)
        _refuse_splits(infos, dataset_folders)
        for inner in infos:
            hidden = any(part.startswith((".", "_")) for part in inner.path[len(path) :].split("/"))
            skipped = hidden or _is_documentation(inner, dataset_folders) or _is_datasets_cache(inner, dataset_folders)
            skipped = skipped or inner.path.lower().endswith(PICTURES)
            if inner.type == fs.FileType.File and not skipped:
                yield inner
    elif re.search(r"[*?\[]", path):
        folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        infos = filesystem.get_file_info(fs.FileSelector(folder, recursive=True, allow_not_found=True))
        dataset_folders = _datasets_folders(infos)
        for inner in infos:
            matches = inner.type == fs.FileType.File and _matches_glob(inner.path.split("/"), path.split("/"))
            if matches and not _is_datasets_cache(inner, dataset_folders):
                yield inner


def _is_documentation(info: Any, dataset_folders: set[str]) -> bool:
    """True for a file about the data, such as a README or the metadata of ``datasets``."""
    if info.base_name.upper().startswith(DOCUMENTATION_PREFIXES) or info.base_name in DATASETS_METADATA:
        return True
    return info.base_name == "state.json" and _folder(info) in dataset_folders


def _folder(info: Any) -> str:
    return info.path.rpartition("/")[0]


def _datasets_folders(infos: list[Any]) -> set[str]:
    """Folders that ``datasets`` has written metadata to."""
    return {_folder(info) for info in infos if info.base_name in DATASETS_METADATA}


def _is_datasets_cache(info: Any, dataset_folders: set[str]) -> bool:
    """True for a cache file of ``map`` or ``filter`` in a ``datasets`` folder: it repeats the records of the dataset."""
    return (
        info.base_name.startswith("cache-") and info.base_name.endswith(".arrow") and _folder(info) in dataset_folders
    )


def _refuse_splits(infos: list[Any], dataset_folders: set[str]) -> None:
    """Refuse a dataset folder with several splits: training on all of them would include the test split."""
    for dataset in (_folder(info) for info in infos if info.base_name == SPLITS_METADATA):
        splits = sorted(folder for folder in dataset_folders if folder.rpartition("/")[0] == dataset)
        if len(splits) > 1:
            names = ", ".join(split.rpartition("/")[2] for split in splits)
            example = next((split for split in splits if split.endswith("/train")), splits[0])
            raise RequestError(
                f"{_display_path(dataset)}: contains the splits {names}; "
                f"set path to the folder of one split, for example {_display_path(example)}, or to a list of them"
            )


def _matches_glob(parts: list[str], patterns: list[str]) -> bool:
    """Match path parts with glob parts; ``**`` matches any number of folders, and no wildcard matches a leading dot."""
    if not patterns or not parts:
        return patterns == parts
    if patterns == ["**"]:
        return not any(part.startswith(".") for part in parts)
    if patterns[0] == "**" and _matches_glob(parts, patterns[1:]):
        return True
    if parts[0].startswith(".") and not patterns[0].startswith("."):
        return False
    return fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches_glob(parts[1:], patterns[patterns[0] != "**" :])
