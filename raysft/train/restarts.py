"""Failures of workers: which error is the cause, in one line, and whether the workers are restarted."""

from __future__ import annotations

import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from raysft.errors import RequestError, RunFailed, RunStopped, StorageFailed, one_line
from raysft.train.checkpoint.catalog import CorruptCheckpoint
from raysft.train.ray_train_internals import (
    DefaultFailurePolicy,
    FailureDecision,
    WorkerGroupStartupFailedError,
)

INFRASTRUCTURE_SIGNS = (
    "gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "ecc error",
)  # fmt: skip
"""Words in the messages of errors that come from the network or from failing hardware; torch has no types for all of them."""


class Fault(RuntimeError):
    """An error in a worker's own code, and the moment of the training at which it was raised.

    Network, machine and storage failures are no faults: they may be gone after a restart.
    """

    def __init__(self, moment: str, kind: str, place: str, line: str, rows: str) -> None:
        super().__init__(moment, kind, place, line, rows)
        self.signature = moment, kind, place
        """Two faults with the same signature are not a coincidence."""
        self.line, self.rows = line, rows
        self.repeated = False
        """True if a fault with this signature was raised before."""

    def __str__(self) -> str:
        """The error, the rows that it concerns, and the remedy if it ended the run."""
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
        rows: returns the rows that it is working on and their records; empty if it works on none.
    """
    try:
        yield
    except (RequestError, RunFailed, CorruptCheckpoint):
        raise
    except Exception as error:
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


class Restarts(DefaultFailurePolicy):
    """Restart the workers after a failure, up to ``train.max_failures`` times, but only once after the same fault."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._signatures: set[tuple[str, str, str]] = set()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Decide whether to restart."""
        fault = _fault(training_failed_error)
        if fault is not None and fault.signature in self._signatures:
            fault.repeated = True
            return FailureDecision.RAISE
        if fault is not None:
            self._signatures.add(fault.signature)
        return super().make_decision(training_failed_error)


def _failures(error: Any) -> dict[int, Any]:
    """Return the failure of each worker, by rank; of one that died the ``RayActorError``, around which Ray Train puts its own."""
    failures = getattr(error, "worker_failures", None) or {}
    return {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}


def _fault(error: Any) -> Fault | None:
    """The first worker's fault; None if a worker died, since that may have caused the errors of the others."""
    failures = _failures(error)
    if any(isinstance(failure, RayActorError) for failure in failures.values()):
        return None
    return next((failures[rank] for rank in sorted(failures) if isinstance(failures[rank], Fault)), None)


def _address(died: RayActorError) -> str:
    """The address of a worker's node, which Ray tells in a line of its own; empty if it does not."""
    found = re.search(r"^\s*ip: (\S+)$", str(died), re.MULTILINE)
    return f" ({found[1]})" if found else ""


def cause(error: Any) -> Exception:
    """Turn Ray Train's error into that of the first worker, or of the controller, as one of ours."""
    controller = getattr(error, "controller_failure", None)
    if isinstance(controller, RequestError | RunFailed | RunStopped):
        return controller
    fault = _fault(error)
    if fault is not None:
        return RunFailed(str(fault))
    failures = _failures(error)
    # A worker that died comes first: the others fail because they cannot reach it.
    for rank in sorted(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank)):
        failure = failures[rank]
        if isinstance(failure, RayActorError):
            return RunFailed(f"worker {rank}{_address(failure)} died: {one_line(failure)}")
        while getattr(failure, "cause", None) is not None:
            failure = failure.cause
        if isinstance(failure, RequestError | RunFailed):
            return failure
        if failure is not None:
            return RunFailed(f"worker {rank} failed: {type(failure).__name__}: {one_line(failure)}")
    if isinstance(controller, WorkerGroupStartupFailedError):
        return RunFailed(f"the workers did not start: {one_line(controller)}")
    return RunFailed(f"the training failed: {one_line(controller or error)}")
