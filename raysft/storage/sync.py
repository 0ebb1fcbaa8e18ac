"""Sync the small files of a run in an object store with a working copy on this machine."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raysft.errors import RunFailed, StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import GENERATION, STOP_FILE, RunDirectory

EVERY_SECONDS = 5.0
"""Time between two uploads of changed files."""
LAST_SECONDS = 30.0
"""Longest time that a run which ends early waits for the storage."""
FOLDERS = ("tensorboard", GENERATION)
"""Folders that are uploaded. Only predictions are fetched again, which a run continues with."""
SYNCED_HIDDEN_SUFFIXES = (".partial", ".done")
"""Suffixes of the hidden files that a run resumes from; other hidden files are drafts and locks."""


class Sync:
    """Keeps a working copy and its run directory in sync."""

    def __init__(self, directory: RunDirectory, notify: Callable[[str], None]) -> None:
        assert directory.remote
        self._local, self._remote, self._notify = directory.path, directory.remote, notify
        self._config = directory.config
        self._synced: dict[str, tuple[int, int]] = {}
        """By name, size and time of the local files that the run directory has too."""
        self._pushing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self, only: Container[str] | None = None) -> None:
        """Replace the working copy by the run directory's files: another machine may have changed them.

        Args:
            only: names of the files. Default: all.
        """
        shutil.rmtree(self._local, ignore_errors=True)
        self._local.mkdir(parents=True, exist_ok=True)
        for name, entry in self._remote.entries().items():
            if not entry.folder and _is_synced(name) and (only is None or name in only):
                (self._remote / name).download(self._local / name)
                self._synced[name] = _signature(self._local / name)
        for name in (self._remote / GENERATION).walk() if only is None else ():
            file = self._local / GENERATION / name
            if name.count("/") == 1 and _is_synced(file.name):  # the model of a step is deeper
                (self._remote / GENERATION / name).download(file)
                self._synced[f"{GENERATION}/{name}"] = _signature(file)

    def push(self) -> None:
        """Upload the files that changed, and remove those that are gone.

        Raises:
            StorageFailed: the storage refuses them or does not respond.
        """
        with self._pushing:
            self._push()

    def _push(self) -> None:
        found = {path.name: path for path in self._local.iterdir() if path.is_file() and _is_synced(path.name)}
        for folder in FOLDERS:
            files = (self._local / folder).rglob("*")
            inside = (path for path in files if path.is_file() and _is_synced(path.name))
            found |= {path.relative_to(self._local).as_posix(): path for path in inside}
        # A process that is killed in between must not leave a new config next to the results or the plan of the old one.
        for name in self._synced.keys() - found.keys():
            (self._remote / name).remove()
            del self._synced[name]
        for name, path in sorted(found.items(), key=lambda file: file[1] == self._config):
            with suppress(FileNotFoundError):  # the run is replacing it
                signature = _signature(path)
                if self._synced.get(name) != signature:
                    (self._remote / name).upload(path)
                    self._synced[name] = signature

    def start(self) -> None:
        """Start pushing at intervals; report a failing storage once."""
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failed, pause = False, EVERY_SECONDS
        while not self._stopped.wait(pause):
            started = time.monotonic()
            try:
                with retry_for(0):
                    self.push()
                failed = False
            except (StorageFailed, OSError) as error:
                if not failed:
                    self._notify(
                        f"{reason_of(error)}; the run continues, and uploads its files when the storage responds again"
                    )
                failed = True
            # Uploads of a long log take at most a tenth of the time.
            pause = max(EVERY_SECONDS, 10 * (time.monotonic() - started))

    def stop(self) -> None:
        """Stop pushing."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()


@contextmanager
def synced(directory: RunDirectory, notify: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Fetch the files of a remote run directory, and push them during the block and at its end.

    Yields:
        Pushes them at once, for what must be there before the run continues; raises StorageFailed if the storage does not take
        them.

    Raises:
        RunFailed: the storage does not take them at the end.
    """
    if directory.remote is None:
        yield lambda: None
        return
    sync = Sync(directory, notify)
    with retry_for(notify=notify):
        sync.fetch()
    sync.start()

    def push_now() -> None:
        with retry_for(notify=notify):
            sync.push()

    try:
        yield push_now
    except BaseException:
        sync.stop()
        with suppress(StorageFailed, OSError), retry_for(LAST_SECONDS, notify):
            sync.push()
        raise
    sync.stop()
    try:
        with retry_for(notify=notify):
            sync.push()
    except StorageFailed as error:
        raise RunFailed(
            f"{error}; the last files of the run are only in {directory.path}; copy them to {directory.place}"
        ) from error


@contextmanager
def open_read_only(
    place: StoragePath, notify: Callable[[str], None], back: bool = False, only: Container[str] | None = None
) -> Iterator[RunDirectory]:
    """Open a run directory to read, without its lock; of a remote one fetch the small files into a temporary folder.

    Args:
        place: the run directory.
        notify: receives a line if the storage does not respond.
        back: push what the block writes into it.
        only: names of the files to fetch. Default: all.
    """
    if place.local:
        yield RunDirectory(place.local)
        return
    with tempfile.TemporaryDirectory(prefix="raysft-run-") as folder:
        directory = RunDirectory(Path(folder) / place.name, place)
        sync = Sync(directory, notify)
        with retry_for(FIRST_SECONDS, notify):
            sync.fetch(only)
        with retry_for(notify=notify):
            yield directory
            if back:
                sync.push()


def _is_synced(name: str) -> bool:
    # A request to stop is read and removed where it was written.
    return name != STOP_FILE and (not name.startswith(".") or name.endswith(SYNCED_HIDDEN_SUFFIXES))


def _signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
