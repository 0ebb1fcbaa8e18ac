"""Errors of a worker's own code, distinguished from those of machines, network and storage. Imports Ray only on an error."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from raysft.errors import RequestError, RunFailed, StorageFailed, one_line
from raysft.train.checkpoint.catalog import CorruptCheckpoint

INFRASTRUCTURE_SIGNS = (
    "gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "ecc error",
)  # fmt: skip
"""Words in the messages of errors that come from the network or from failing hardware; torch lacks types for some."""


class BadImage(RunFailed):
    """An image cannot be used; only the worker that needs it finds out."""


class Fault(RuntimeError):
    """An error in a worker's own code, and the point in the training at which it was raised.

    Network, machine and storage failures are not faults: a restart may fix them.
    """

    def __init__(self, moment: str, kind: str, place: str, line: str, rows: str) -> None:
        super().__init__(moment, kind, place, line, rows)
        self.signature = moment, kind, place
        """Two faults with the same signature are not a coincidence."""
        self.line, self.rows = line, rows
        self.repeated = False
        """True if a fault with this signature was raised before."""

    def __str__(self) -> str:
        """The error, the rows concerned, and the remedy if it ended the run."""
        shown = self.line + (f"; {self.rows}" if self.rows else "")
        if not self.repeated:
            return shown
        remedy = "fix the cause" + (", or remove these records" if self.rows else "")
        return f"{shown}; not retried, because it failed the same way before: {remedy}"


@contextmanager
def faults_of(rank: int, moment: Callable[[], str], rows: Callable[[], str]) -> Iterator[None]:
    """Turn errors of a worker's own code into a ``Fault``; infrastructure errors are raised unchanged.

    Args:
        rank: of this worker.
        moment: returns what the worker is doing, for messages: ``step 4``.
        rows: returns the rows that it is working on and their records; empty if there are none.
    """
    try:
        yield
    except (RequestError, RunFailed, CorruptCheckpoint):
        raise
    except Exception as error:
        from ray.exceptions import RayTaskError

        own: BaseException = error
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            own = error.cause  # raised in a data task
        if _is_infrastructure(own):
            raise
        at, kind, place = moment(), type(own).__name__, _place(error)
        try:
            on = rows()
        except Exception:  # the error itself must be reported even if a shard cannot be read
            on = ""
        line = f"worker {rank} ({socket.gethostname()}) failed in {at}: {kind}: {one_line(own)} ({place})"
        raise Fault(at, kind, place, line, on) from error


def _is_infrastructure(error: BaseException) -> bool:
    """Return True if the error shows a failing machine, connection or storage, so that a restart may help."""
    from ray.exceptions import RayError

    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError | StorageFailed | RayError):
        return True
    return any(sign in str(error).lower() for sign in INFRASTRUCTURE_SIGNS)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "?"
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}"
