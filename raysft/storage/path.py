"""Files and folders by local path or by URI, read and written in one way whatever holds them.

A storage that is away for a while is waited for, and each wait is bounded and says what it waits for.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from raysft.storage.filesystems import filesystem_of, options_of, quoted
from raysft.storage.retry import retry

SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""What pyarrow has a filesystem for. ``file`` is a local path."""
WHOLE_OR_NOTHING = ("s3", "gs", "gcs", "abfs", "abfss")
"""Where a file is seen only when all of it is there; elsewhere a draft is renamed."""
CHUNK_BYTES = 16 << 20

Got = TypeVar("Got")


@dataclass(frozen=True)
class Entry:
    """What a listing says of a file or folder."""

    size: int
    modified: int
    """Nanoseconds since 1970; 0 where the storage does not say."""
    folder: bool = False


@dataclass(frozen=True)
class StoragePath:
    """A file or folder on any filesystem; in an object store folders are there when something is in them."""

    location: str
    """An absolute local path, or a URI with its options (``?region=…``)."""

    @classmethod
    def of(cls, location: str | Path | StoragePath) -> StoragePath:
        """The place that a path or URI names.

        >>> StoragePath.of("s3://key:secret@bucket/runs?region=eu-north-1") / "a b"
        StoragePath('s3://bucket/runs/a b')
        """
        if isinstance(location, StoragePath):
            return location
        text = str(location)
        if text.startswith("file://"):
            text = unquote(urlsplit(text).path)
        if "://" not in text:
            return cls(str(Path(text).expanduser().absolute()))
        options = options_of(text)
        return cls(text.removesuffix(options).rstrip("/") + options)

    def __str__(self) -> str:
        """For people: without options, and without secrets."""
        if self.local:
            return self.location
        scheme, _, rest = self.location.removesuffix(options_of(self.location)).partition("://")
        return f"{scheme}://{unquote(re.sub('^[^/@]*:[^/@]*@', '', rest))}"

    def __repr__(self) -> str:
        return f"StoragePath({str(self)!r})"

    def __truediv__(self, name: str) -> StoragePath:
        if self.local:
            return StoragePath(str(self.local / name))
        options = options_of(self.location)
        return replace(self, location=f"{self.location.removesuffix(options)}/{quoted(name)}{options}")

    @property
    def local(self) -> Path | None:
        """The path; None where it is not a local one."""
        return None if "://" in self.location else Path(self.location)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        """The folder around it."""
        if self.local:
            return StoragePath(str(self.local.parent))
        options = options_of(self.location)
        return StoragePath(self.location.removesuffix(options).rpartition("/")[0] + options)

    def exists(self) -> bool:
        """Whether there is such a file, or a folder with something in it."""
        if self.local:
            return self.local.exists()
        return self._info() is not None

    def entry(self) -> Entry:
        """Size and time.

        Raises:
            FileNotFoundError: there is nothing.
        """
        if self.local:
            return _entry_of(self.local.stat())
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(self))
        return _entry(info)

    def entries(self) -> dict[str, Entry]:
        """What is in the folder, by name; empty where there is no such folder."""
        if self.local:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.local) as found:
                return {each.name: _entry_of(each.stat()) for each in sorted(found, key=lambda each: each.name)}
            return {}
        return self._listed(recursive=False)

    def walk(self) -> dict[str, Entry]:
        """All files in the folder and in the folders in it, by their path from here."""
        if self.local:
            files = sorted(path for path in self.local.rglob("*") if path.is_file())
            found = {}
            for path in files:
                with suppress(FileNotFoundError):
                    found[path.relative_to(self.local).as_posix()] = _entry_of(path.stat())
            return found
        return {name: each for name, each in self._listed(recursive=True).items() if not each.folder}

    def read(self, function: Callable[[Any], Got]) -> Got:
        """What a function gives that reads the open file; it is called again where the storage failed on the way.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if self.local:
            with self.local.open("rb") as file:
                return function(file)

        def once(filesystem: Any, path: str) -> Got:
            with filesystem.open_input_file(path) as file:
                return function(file)

        return self.with_retries(once)

    def write(self, function: Callable[[Any], Got]) -> Got:
        """Let a function write the file, which is seen when all of it is there; called again where the storage failed."""
        if self.local:
            self.local.parent.mkdir(parents=True, exist_ok=True)
            draft = self.local.with_name(f".{self.local.name}.{uuid.uuid4().hex}")
            try:
                with draft.open("wb") as stream:
                    got = function(stream)
                draft.replace(self.local)
            finally:
                draft.unlink(missing_ok=True)
            return got
        return self.with_retries(lambda filesystem, path: self._write_once(filesystem, path, function))

    def _write_once(self, filesystem: Any, path: str, function: Callable[[Any], Got]) -> Got:
        folder, _, name = path.rpartition("/")
        direct = self.location.split("://")[0] in WHOLE_OR_NOTHING
        draft = path if direct else f"{folder}/.{name}.{uuid.uuid4().hex}"
        if not direct:
            filesystem.create_dir(folder, recursive=True)
        try:
            with filesystem.open_output_stream(draft, compression=None) as stream:
                got = function(stream)
            if not direct:
                if self._info_once(filesystem, path) is not None:
                    filesystem.delete_file(path)
                filesystem.move(draft, path)
        except BaseException:
            # A stream that is left early is closed like one that is done.
            with suppress(Exception):
                filesystem.delete_file(draft)
            raise
        return got

    def read_bytes(self) -> bytes:
        """The content."""
        return self.read(lambda file: file.read())

    def read_text(self) -> str:
        """The content as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, content: bytes) -> None:
        """Put a file in place."""
        self.write(lambda stream: stream.write(content))

    def write_text(self, content: str) -> None:
        """Put a text in place, as UTF-8."""
        self.write_bytes(content.encode("utf-8"))

    def upload(self, source: Path, last: str | None = None) -> None:
        """Put a local file here, or the files of a local folder; ``last`` names the one that says that all are there."""
        if source.is_file():
            with source.open("rb") as file:

                def copy(stream: Any) -> None:
                    file.seek(0)
                    shutil.copyfileobj(file, stream, CHUNK_BYTES)

                self.write(copy)
            return
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in sorted(names, key=lambda name: (name == last, name)):
            (self / name).upload(source / name)

    def download(self, target: Path) -> None:
        """Bring the file to a local path, which is there when all of it is."""

        def copy(file: Any) -> None:
            StoragePath(str(target.absolute())).write(lambda stream: shutil.copyfileobj(file, stream, CHUNK_BYTES))

        self.read(copy)

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it; what is not there may stay away."""
        if self.local:
            if self.local.is_dir() and not self.local.is_symlink():
                shutil.rmtree(self.local, ignore_errors=True)
            else:
                self.local.unlink(missing_ok=True)
            return

        def once(filesystem: Any, path: str) -> None:
            info = self._info_once(filesystem, path)
            if info is not None:
                (filesystem.delete_dir if _entry(info).folder else filesystem.delete_file)(path)

        with suppress(FileNotFoundError):  # somebody else removed it in this moment
            self.with_retries(once)

    def _info(self) -> Any:
        return self.with_retries(self._info_once)

    def _info_once(self, filesystem: Any, path: str) -> Any:
        from pyarrow import fs

        info = filesystem.get_file_info(path)
        return None if info.type == fs.FileType.NotFound else info

    def _listed(self, recursive: bool) -> dict[str, Entry]:
        from pyarrow import fs

        def once(filesystem: Any, path: str) -> dict[str, Entry]:
            infos = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
            return {info.path[len(path) :].lstrip("/"): _entry(info) for info in infos}

        return dict(sorted(self.with_retries(once).items()))

    def with_retries(self, operation: Callable[[Any, str], Got]) -> Got:
        """Call an operation with the filesystem and the path in it, retried as ``retry_for`` says.

        Raises:
            StorageFailed: the storage refuses, or failed for as long as it is retried.
        """
        return retry(lambda: operation(*filesystem_of(self.location)), str(self))


def _entry(info: Any) -> Entry:
    from pyarrow import fs

    return Entry(info.size or 0, info.mtime_ns or 0, info.type == fs.FileType.Directory)


def _entry_of(status: os.stat_result) -> Entry:
    return Entry(status.st_size, status.st_mtime_ns, (status.st_mode & 0o170000) == 0o040000)
