"""The small files of a run in an object store: worked on in a copy on this machine, which is brought there as it changes."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysft.errors import RunFailed, StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import RunDirectory

EVERY_SECONDS = 5.0
"""How often what changed is brought there."""
LAST_SECONDS = 30.0
"""How long a run that ends early waits for the storage."""
FOLDERS = ("tensorboard",)
"""Folders that are brought there; nobody reads them here, so they are not fetched."""
OF_JOURNALS = (".partial", ".done")
"""Endings of hidden files that a run goes on from; other hidden files are drafts and locks."""


class Sync:
    """Keeps the files of a working copy and those of the run directory alike."""

    def __init__(self, directory: RunDirectory, notify: Callable[[str], None]) -> None:
        assert directory.remote
        self._here, self._there, self._say = directory.path, directory.remote, notify
        self._same: dict[str, tuple[int, int]] = {}
        """Size and time here of what is there too, by name."""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Make the working copy what is there: that may have come from another machine since."""
        shutil.rmtree(self._here, ignore_errors=True)
        self._here.mkdir(parents=True, exist_ok=True)
        for name, entry in self._there.entries().items():
            if not entry.folder and _belongs(name):
                (self._there / name).download(self._here / name)
                self._same[name] = _signature(self._here / name)

    def push(self) -> None:
        """Bring there what changed, and take away what is no more.

        Raises:
            StorageFailed: the storage takes nothing.
        """
        found = {path.name: path for path in self._here.iterdir() if path.is_file() and _belongs(path.name)}
        for folder in FOLDERS:
            inside = (path for path in (self._here / folder).rglob("*") if path.is_file())
            found |= {path.relative_to(self._here).as_posix(): path for path in inside}
        # First what is no more: who is killed in between must not find another config beside the results of the one before.
        for name in self._same.keys() - found.keys():
            (self._there / name).remove()
            del self._same[name]
        for name, path in found.items():
            with suppress(FileNotFoundError):  # replaced in this moment
                signature = _signature(path)
                if self._same.get(name) != signature:
                    (self._there / name).upload(path)
                    self._same[name] = signature

    def start(self) -> None:
        """Push from time to time; a storage that fails meanwhile is said once."""
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failed, pause = False, EVERY_SECONDS
        while not self._done.wait(pause):
            begun = time.monotonic()
            try:
                with retry_for(0):
                    self.push()
                failed = False
            except (StorageFailed, OSError) as error:
                if not failed:
                    self._say(f"{reason_of(error)}; the run goes on, and its files follow when the storage answers")
                failed = True
            pause = max(EVERY_SECONDS, 10 * (time.monotonic() - begun))  # a long log is not sent all the time

    def stop(self) -> None:
        """Push no more."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()


@contextmanager
def synced(directory: RunDirectory, notify: Callable[[str], None]) -> Iterator[None]:
    """While a process works in a run directory: its files come here at the start, and go there meanwhile and at the end.

    Raises:
        RunFailed: at the end the storage does not take them.
    """
    if directory.remote is None:
        yield
        return
    mirror = Sync(directory, notify)
    with retry_for(notify=notify):
        mirror.fetch()
    mirror.start()
    try:
        yield
    except BaseException:
        mirror.stop()
        with suppress(StorageFailed, OSError), retry_for(LAST_SECONDS, notify):
            mirror.push()
        raise
    mirror.stop()
    try:
        with retry_for(notify=notify):
            mirror.push()
    except StorageFailed as error:
        raise RunFailed(f"{error}; the last files of the run are in {directory.path} alone") from error


@contextmanager
def open_read_only(place: StoragePath, notify: Callable[[str], None], back: bool = False) -> Iterator[RunDirectory]:
    """A run directory to read, beside whoever works in it; of one in an object store a passing copy of its small files.

    Args:
        place: the run directory.
        notify: takes a line where the storage has to be waited for.
        back: bring there what is written into it.
    """
    if place.local:
        yield RunDirectory(place.local)
        return
    with tempfile.TemporaryDirectory(prefix="raysft-run-") as folder:
        directory = RunDirectory(Path(folder) / place.name, place)
        mirror = Sync(directory, notify)
        with retry_for(FIRST_SECONDS, notify):
            mirror.fetch()
        with retry_for(notify=notify):
            yield directory
            if back:
                mirror.push()


def _belongs(name: str) -> bool:
    return not name.startswith(".") or name.endswith(OF_JOURNALS)


def _signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
