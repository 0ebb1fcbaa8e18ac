"""One process at a time works in a run directory, on whatever machine it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for

BEAT_SECONDS = 5.0
"""How often the holder says that it is alive."""
SETTLE_SECONDS = 1.0
"""How long who takes an object store's folder waits for another that takes it in the same moment."""
DEAD_SECONDS = 30.0
"""A holder on another machine that said nothing for so long is dead."""


class Locked(Exception):
    """Another process that is alive works in the folder."""


@dataclass(frozen=True)
class LockOwner:
    """Who works in a folder."""

    host: str
    process: int
    born: float
    """When the process started, in seconds since 1970: its number may be another's later."""
    token: str
    """Of this holding alone."""
    beat: int = 0
    """Counts up while it is alive."""
    processes: str = ""
    """Among which its number counts: containers may have one name and processes of their own."""

    @classmethod
    def me(cls) -> LockOwner:
        """This process."""
        born, token = psutil.Process().create_time(), uuid.uuid4().hex
        return cls(socket.gethostname(), os.getpid(), born, token, processes=_processes())

    def is_alive(self) -> bool | None:
        """Whether the process runs; None on another machine, where only its signs can tell."""
        if (self.host, self.processes) != (socket.gethostname(), _processes()):
            return None
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) < 1.0
        except psutil.NoSuchProcess:
            return False


@contextmanager
def lock(folder: StoragePath | Path, notify: Callable[[str], None] = print) -> Iterator[None]:
    """Hold a folder, and let it go at the end; a holder that is dead is followed at once, on another machine after a while.

    Args:
        folder: is made where it is not there; it may be in an object store.
        notify: takes a line where it has to be waited for.

    Raises:
        Held: another process that is alive holds it.
    """
    folder, me = StoragePath.of(folder), LockOwner.me()
    if folder.local:
        folder.local.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    try:
        _take(file, me, notify)
    except PermissionError as error:
        raise Locked(f"{file}: cannot be read or written ({error.strerror})") from None
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, me, done, notify), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join(timeout=BEAT_SECONDS)
        with suppress(StorageFailed), retry_for(BEAT_SECONDS, notify), suppress(OSError):
            if _holder(file, me.token):
                file.remove()


def _take(file: StoragePath, me: LockOwner, notify: Callable[[str], None]) -> None:
    if file.local:  # an object store makes no file only where there is none
        try:
            with file.local.open("x") as stream:
                json.dump(asdict(me), stream)
            return
        except FileExistsError:
            if _holder(file) is None:  # perhaps it is being written just now
                time.sleep(SETTLE_SECONDS / 5)
    other = _holder(file)
    alive = other.is_alive() if other else False
    if alive is None:
        assert other is not None
        notify(
            f"{file.parent}: process {other.process} on {other.host} works here; waiting {DEAD_SECONDS:.0f} s for a sign"
        )
        limit = time.monotonic() + DEAD_SECONDS
        while time.monotonic() < limit and not alive:
            time.sleep(min(1.0, DEAD_SECONDS / 4))
            sign = _holder(file)
            if sign is None:
                break  # it has let go meanwhile
            alive = sign != other
    if alive:
        who = _holder(file) or other
        raise Locked(f"{file.parent}: " + (f"process {who.process} on {who.host} works here" if who else "is in use"))
    _write(file, me)
    # Of several that follow a dead one the last to write holds it; who wrote before sees that now, or at its next sign.
    time.sleep(0.2 if file.local else SETTLE_SECONDS)
    if not _holder(file, me.token):
        raise Locked(f"{file.parent}: another process began to work here in this moment")


def _beat(file: StoragePath, me: LockOwner, done: threading.Event, notify: Callable[[str], None]) -> None:
    count = 0
    while not done.wait(BEAT_SECONDS):
        count += 1
        try:
            with retry_for(0):
                other = _holder(file)
        except (OSError, StorageFailed):
            continue  # away for a while, for all others too
        if other is not None and other.token != me.token:
            # This machine slept, and was taken for dead: two must not write.
            notify(f"{file.parent}: process {other.process} on {other.host} took over; this one stops")
            # Not SIGINT, which may be switched off for what runs in the background.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with suppress(OSError, StorageFailed), retry_for(0):
            _write(file, replace(me, beat=count))


def _processes() -> str:
    """Of this machine since its start, and of this container."""
    parts = []
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _write(file: StoragePath, holder: LockOwner) -> None:
    file.write_text(json.dumps(asdict(holder)))


def _holder(file: StoragePath, token: str | None = None) -> LockOwner | None:
    """Who the file names; with a token only that one.

    Raises:
        OSError: it is there and cannot be read, which says nothing of who holds it.
    """
    try:
        holder = LockOwner(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return holder if token is None or holder.token == token else None
