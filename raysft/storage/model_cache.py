"""Models that raysft makes in its cache: each is written once, by one process, and is there as a whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from raysft.errors import RequestError, RunFailed, lacks_space, one_line
from raysft.storage.cache_home import cache_home
from raysft.storage.path import StoragePath
from raysft.storage.permissions import let_others_read

LEFT_SECONDS = 86400
"""Seconds after which an unfinished copy of another machine counts as left behind."""


def in_cache(
    target: StoragePath, write: Callable[[Path], None], notify: Callable[[str], None], mark: str = "config.json"
) -> StoragePath:
    """Return a model folder in the cache; the first process writes it, others wait for it.

    Args:
        target: the folder.
        write: makes its content in a folder that does not exist yet.
        notify: receives a line if another process writes it.
        mark: the file by which a folder is known to be whole.

    Raises:
        RequestError: nothing can be written there.
        RunFailed: the disk is full.
    """
    if (target / mark).exists():
        return target
    # For an object store write it locally, then upload; machines that do so at once upload the same files.
    beside = target.local.parent if target.local else cache_home() / "models"
    # Only processes that need this model wait here, while one of them writes it.
    with _opened(beside, target.name) as lock:
        _take(lock, target, notify)
        if not (target / mark).exists():
            _remove_left(beside, target.name)
            draft = beside / f".{target.name}.{boot()}-{uuid.uuid4().hex}"
            try:
                write(draft)
                let_others_read(draft)
                if target.local:
                    if target.local.exists():  # without its mark: somebody has removed a part of it
                        shutil.rmtree(target.local)
                    draft.replace(target.local)
                else:
                    target.upload(draft, last=mark)
            except Exception as error:
                if not lacks_space(error) or isinstance(error, RunFailed):
                    raise
                raise RunFailed(
                    f"{beside}: has no room for {target.name} ({one_line(error)}); free some space, or set data.cache to a folder "
                    "with more, then run the same command again"
                ) from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return target


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[TextIO]:
    """Open the lock of a model."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f".{name}.lock").open("w")
    except OSError as error:
        raise RequestError(
            f"{folder}: a copy of the model cannot be written there ({error.strerror}); set data.cache to another folder, or "
            "correct its permissions"
        ) from None
    with file:
        yield file


def _take(lock: TextIO, target: StoragePath, notify: Callable[[str], None]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        notify(f"model: waiting for another process, which writes {target}")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _remove_left(folder: Path, name: str) -> None:
    """Remove what killed processes have left of a model; the caller holds its lock.

    The lock keeps out all processes of this machine, but on some network file systems none of another one: what those left is
    removed if nothing was written to it for a day.
    """
    own = f".{name}.{boot()}-"
    for draft in folder.glob(f".{name}.*"):
        with suppress(OSError):
            if draft.is_dir() and (
                draft.name.startswith(own)
                or time.time() - max(path.stat().st_mtime for path in (draft, *draft.rglob("*"))) > LEFT_SECONDS
            ):
                shutil.rmtree(draft, ignore_errors=True)


def boot() -> str:
    """Return an id of this machine since it was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
