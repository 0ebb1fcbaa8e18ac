"""Files and folders by local path or URI, with one interface for every filesystem.

Operations on a storage that does not respond are retried for a bounded time, and say what they wait for.
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

from raysft.errors import StorageFailed
from raysft.storage.filesystems import filesystem_of, options_of, quoted
from raysft.storage.retry import retry

SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
"""Schemes with a filesystem in pyarrow. ``file`` is a local path."""
WHOLE_OR_NOTHING = ("s3", "gs", "gcs", "abfs", "abfss")
"""Schemes whose files appear only once they are complete; elsewhere a draft is written and renamed."""
CHUNK_BYTES = 16 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """A file or folder in a listing."""

    size: int
    modified: int
    """Nanoseconds since 1970; 0 if the storage does not say."""
    folder: bool = False


@dataclass(frozen=True)
class StoragePath:
    """A file or folder on any filesystem; in an object store a folder exists if it has files."""

    location: str
    """An absolute local path, or a URI with its options (``?region=…``)."""

    @classmethod
    def of(cls, location: str | Path | StoragePath) -> StoragePath:
        """Return the file or folder that a path or URI names.

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
        """Return the location for messages: without options and secrets."""
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
        """The local path; None for a URI."""
        return None if "://" in self.location else Path(self.location)

    @property
    def name(self) -> str:
        """The last component."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> StoragePath:
        """The folder that contains it."""
        if self.local:
            return StoragePath(str(self.local.parent))
        options = options_of(self.location)
        return StoragePath(self.location.removesuffix(options).rpartition("/")[0] + options)

    def exists(self) -> bool:
        """Return True if the file, or a folder with files in it, exists."""
        if self.local:
            return self.local.exists()
        return self._info() is not None

    def entry(self) -> Entry:
        """Return size and time of the file or folder.

        Raises:
            FileNotFoundError: it does not exist.
        """
        if self.local:
            return _entry_of(self.local.stat())
        info = self._info()
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "no such file or folder", str(self))
        return _entry(info)

    def entries(self) -> dict[str, Entry]:
        """List the folder by name; empty if it does not exist."""
        if self.local:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.local) as listing:
                return {item.name: _entry_of(item.stat()) for item in sorted(listing, key=lambda item: item.name)}
            return {}
        return self._list(recursive=False)

    def walk(self) -> dict[str, Entry]:
        """List all files below the folder by their relative paths."""
        if self.local:
            files = sorted(path for path in self.local.rglob("*") if path.is_file())
            found = {}
            for path in files:
                with suppress(FileNotFoundError):
                    found[path.relative_to(self.local).as_posix()] = _entry_of(path.stat())
            return found
        return {name: entry for name, entry in self._list(recursive=True).items() if not entry.folder}

    def read(self, function: Callable[[Any], Result]) -> Result:
        """Return what a function makes of the open file; it is called again if the storage fails meanwhile.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        if self.local:
            with self.local.open("rb") as file:
                return function(file)

        def once(filesystem: Any, path: str) -> Result:
            with filesystem.open_input_file(path) as file:
                return function(file)

        return self.with_retries(once)

    def write(self, function: Callable[[Any], Result]) -> Result:
        """Let a function write the file, which appears once it is complete; called again if the storage fails meanwhile."""
        if self.local:
            self.local.parent.mkdir(parents=True, exist_ok=True)
            draft = self.local.with_name(f".{self.local.name}.{uuid.uuid4().hex}")
            try:
                with draft.open("wb") as stream:
                    result = function(stream)
                draft.replace(self.local)
            finally:
                draft.unlink(missing_ok=True)
            return result
        return self.with_retries(lambda filesystem, path: self._write_once(filesystem, path, function))

    def _write_once(self, filesystem: Any, path: str, function: Callable[[Any], Result]) -> Result:
        folder, _, name = path.rpartition("/")
        direct = self.location.split("://")[0] in WHOLE_OR_NOTHING
        draft = path if direct else f"{folder}/.{name}.{uuid.uuid4().hex}"
        if not direct:
            filesystem.create_dir(folder, recursive=True)
        try:
            with filesystem.open_output_stream(draft, compression=None) as stream:
                result = function(stream)
            if not direct:
                if self._info_once(filesystem, path) is not None:
                    filesystem.delete_file(path)
                filesystem.move(draft, path)
        except BaseException:
            # An aborted stream is closed like a complete one, so its file may exist.
            with suppress(Exception):
                filesystem.delete_file(draft)
            raise
        return result

    def read_bytes(self) -> bytes:
        """Return the content."""
        return self.read(lambda file: file.read())

    def read_text(self) -> str:
        """Return the content, decoded as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def write_bytes(self, content: bytes) -> None:
        """Write the file."""
        self.write(lambda stream: stream.write(content))

    def write_text(self, content: str) -> None:
        """Write the file, encoded as UTF-8."""
        self.write_bytes(content.encode("utf-8"))

    def upload(self, source: Path, last: str | None = None) -> None:
        """Write a local file or folder here; the file named ``last`` comes last, to mark a complete folder."""
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
        """Copy the file to a local path, which appears once it is complete."""

        def copy(file: Any) -> None:
            StoragePath(str(target.absolute())).write(lambda stream: shutil.copyfileobj(file, stream, CHUNK_BYTES))

        self.read(copy)

    def remove(self) -> None:
        """Remove the file, or the folder with everything in it; it need not exist."""
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

        with suppress(FileNotFoundError):  # another process removed it meanwhile
            self.with_retries(once)

    def ensure_writable(self) -> None:
        """Create the folder; in an object store check that it keeps what is written to it.

        Raises:
            OSError: the folder cannot be created.
            StorageFailed: the storage refused, did not respond, or is not an object store.
        """
        if self.local:
            self.local.mkdir(parents=True, exist_ok=True)
            return
        name = f".probe-{uuid.uuid4().hex}"
        probe = self / name
        probe.write_text(name)
        # A server that is not an object store may answer every request with success.
        if probe.read_bytes() != name.encode():
            raise StorageFailed(
                f"{self}: returns content other than what was written; the server is not an object store"
            )
        probe.remove()

    def _info(self) -> Any:
        return self.with_retries(self._info_once)

    def _info_once(self, filesystem: Any, path: str) -> Any:
        from pyarrow import fs

        info = filesystem.get_file_info(path)
        return None if info.type == fs.FileType.NotFound else info

    def _list(self, recursive: bool) -> dict[str, Entry]:
        from pyarrow import fs

        def once(filesystem: Any, path: str) -> dict[str, Entry]:
            infos = filesystem.get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True))
            return {info.path[len(path) :].lstrip("/"): _entry(info) for info in infos}

        return dict(sorted(self.with_retries(once).items()))

    def with_retries(self, operation: Callable[[Any, str], Result]) -> Result:
        """Call an operation with the filesystem and the path in it; retry it as ``retry_for`` says.

        Raises:
            StorageFailed: the storage refused, or failed until the time limit.
        """
        return retry(lambda: operation(*filesystem_of(self.location)), str(self))


def _entry(info: Any) -> Entry:
    from pyarrow import fs

    return Entry(info.size or 0, info.mtime_ns or 0, info.type == fs.FileType.Directory)


def _entry_of(status: os.stat_result) -> Entry:
    return Entry(status.st_size, status.st_mtime_ns, (status.st_mode & 0o170000) == 0o040000)
