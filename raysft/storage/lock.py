"""Lock a run directory for one process, across machines."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for

BEAT_SECONDS = 5.0
"""Time between two heartbeats of the owner."""
SETTLE_SECONDS = 1.0
"""Time to wait after taking a lock in an object store, for another process that takes it at the same moment."""
DEAD_SECONDS = 30.0
"""Time without a heartbeat after which an owner on another machine counts as dead."""


_lost = threading.Event()


def lost_lock() -> bool:
    """Return True, once, if another process took a lock of this one over: it must end at once, and write nothing more."""
    lost = _lost.is_set()
    _lost.clear()
    return lost


class Locked(Exception):
    """Another live process uses the folder."""


class LockDenied(Locked):
    """The lock belongs to another user, and this one may not read or write it."""


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock."""

    host: str
    process: int
    born: float
    """Start of the process in seconds since the machine's own; a later process may get the same number."""
    token: str
    """Unique for each time that a lock is taken."""
    beat: int = 0
    """Number of heartbeats."""
    processes: str = ""
    """Boot and process namespace of the process number: containers may share a host name."""

    @classmethod
    def me(cls) -> LockOwner:
        """Return this process as an owner."""
        born, token = _born(psutil.Process()), uuid.uuid4().hex
        return cls(socket.gethostname(), os.getpid(), born, token, processes=_processes())

    def is_alive(self) -> bool | None:
        """Return True if the process runs; None on another machine, where only heartbeats tell."""
        if (self.host, self.processes) != (socket.gethostname(), _processes()):
            return None
        try:
            process = psutil.Process(self.process)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False  # it has ended, and nobody has asked how: many containers have no process that does
            return abs(_born(process) - self.born) < 1.5  # the machine's own start is known to a second
        except (psutil.NoSuchProcess, ValueError, OverflowError):  # no process can have such a number
            return False


@contextmanager
def lock(folder: StoragePath | Path, notify: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a folder for the block; take over the lock of a dead process.

    Args:
        folder: local or in an object store; it is created if needed.
        notify: receives a line while an owner on another machine has time for a heartbeat.

    Raises:
        Locked: another live process holds it.
    """
    folder, me = StoragePath.of(folder), LockOwner.me()
    if folder.local:
        folder.local.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    try:
        _take(file, me, notify)
    except PermissionError as error:
        raise LockDenied(f"{file}: cannot be read or written ({error.strerror}); another user may hold it") from None
    stopped = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(file, me, stopped, notify), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stopped.set()
        heartbeat.join(timeout=BEAT_SECONDS)
        with suppress(StorageFailed), retry_for(BEAT_SECONDS, notify), suppress(OSError):
            if _read_owner(file, me.token):
                file.remove()


@contextmanager
def lock_within(
    seconds: float,
    folder: StoragePath,
    notify: Callable[[str], None],
    waiting: Callable[[Locked], None] = lambda held: None,
) -> Iterator[None]:
    """Hold the lock of a folder for the block, as ``lock`` does, once the process that holds it lets go of it.

    Args:
        seconds: longest time to wait.
        folder: local or in an object store.
        notify: as for ``lock``.
        waiting: receives each refusal.

    Raises:
        Locked: it is still held then.
    """
    limit = time.monotonic() + seconds
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(folder, notify))
                break
            except Locked as held:
                if time.monotonic() > limit:
                    raise
                waiting(held)
                time.sleep(0.2)
        yield


def _take(file: StoragePath, me: LockOwner, notify: Callable[[str], None]) -> None:
    if file.local:  # an object store cannot create a file exclusively
        try:
            with file.local.open("x") as stream:
                json.dump(asdict(me), stream)
            return
        except FileExistsError:
            if _read_owner(file) is None:  # another process may be writing it
                time.sleep(SETTLE_SECONDS / 5)
    other = _read_owner(file)
    alive = other is not None and _is_alive(file, other, notify)
    if alive:
        who = _read_owner(file) or other
        raise Locked(
            f"{file.parent}: " + (f"process {who.process} on {who.host} uses this folder" if who else "is in use")
        )
    _write(file, me)
    # If several processes take over, the last to write owns the lock; the others see that now or at their next heartbeat.
    time.sleep(0.2 if file.local else SETTLE_SECONDS)
    if not _read_owner(file, me.token):
        raise Locked(f"{file.parent}: another process took the lock at the same moment")


def live_owner(folder: StoragePath, notify: Callable[[str], None] = print) -> LockOwner | None:
    """Return the live process that holds the lock of a folder; None if nobody does.

    Args:
        folder: local or in an object store.
        notify: receives a line while an owner on another machine has time for a heartbeat.

    Raises:
        LockDenied: the lock cannot be read.
    """
    file = folder / ".lock"
    try:
        owner = _read_owner(file)
        return owner if owner is not None and _is_alive(file, owner, notify) else None
    except PermissionError as error:
        raise LockDenied(f"{file}: cannot be read ({error.strerror}); another user may hold it") from None


def _is_alive(file: StoragePath, owner: LockOwner, notify: Callable[[str], None]) -> bool:
    """Return True if the owner that a file names runs; on another machine, if its heartbeat changes within some time."""
    alive = owner.is_alive()
    if alive is not None:
        return alive
    who = f"process {owner.process} on {owner.host}"
    notify(f"{file.parent}: {who} uses this folder; waiting {DEAD_SECONDS:.0f} s for its heartbeat")
    limit = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < limit:
        time.sleep(min(1.0, DEAD_SECONDS / 4))
        latest = _read_owner(file)
        if latest is None:
            return False  # the owner released it
        if latest != owner:
            return True
    return False


def _beat(file: StoragePath, me: LockOwner, stopped: threading.Event, notify: Callable[[str], None]) -> None:
    count = 0
    while not stopped.wait(BEAT_SECONDS):
        count += 1
        try:
            with retry_for(0):
                other = _read_owner(file)
        except (OSError, StorageFailed):
            continue  # the storage does not respond, nor does it to others
        if other is not None and other.token != me.token:
            # This machine was suspended and counted as dead; two processes must not write.
            notify(f"{file.parent}: process {other.process} on {other.host} took over the lock; this process stops")
            _lost.set()
            # Not SIGINT, which background processes may ignore.
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with suppress(OSError, StorageFailed), retry_for(0):
            _write(file, replace(me, beat=count))


def _born(process: psutil.Process) -> float:
    # The time since 1970 moves, for processes that run as well, when somebody sets the clock.
    return process.create_time() - psutil.boot_time()


def _processes() -> str:
    """Return an id of this machine's boot and of this container's process namespace."""
    parts = []
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.is_symlink() else path.read_text().strip())
    return " ".join(parts)


def _write(file: StoragePath, owner: LockOwner) -> None:
    file.write_text(json.dumps(asdict(owner)))


def _read_owner(file: StoragePath, token: str | None = None) -> LockOwner | None:
    """Return the owner that the file names; with a token only the owner with that token.

    Raises:
        OSError: the file cannot be read, so its owner is unknown.
    """
    try:
        owner = LockOwner(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return owner if token is None or owner.token == token else None
