"""What workers raise and what Ray Train makes of it → what happened, in one line, and whether to start again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from raysft.errors import RequestError, RunFailed, StorageFailed
from raysft.train.checkpoint.format import CorruptCheckpoint

SIGNS_OF_ANOTHERS_DEATH = (
    "gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "ecc error",
)  # fmt: skip
"""What errors say that come from the network or from failing hardware; torch gives them no types of their own everywhere."""


class Fault(RuntimeError):
    """What a worker's own code raised, with the moment of the training in which it did."""

    def __init__(self, moment: str, kind: str, place: str, line: str, rows: str) -> None:
        super().__init__(moment, kind, place, line, rows)
        self.mark = moment, kind, place
        """Two that are alike in this are no accident."""
        self.line, self.rows = line, rows
        self.again = False
        """Whether the same came before."""

    def __str__(self) -> str:
        """What happened, on which rows, and why it ended the run."""
        told = self.line + (f"; {self.rows}" if self.rows else "")
        if not self.again:
            return told
        remedy = "fix the cause" + (", or take these records out" if self.rows else "")
        return f"{told}; this is the second time, so it is not tried again: {remedy}"


@contextmanager
def faults_of(rank: int, moment: Callable[[], str], rows: Callable[[], str]) -> Iterator[None]:
    """Let a worker's errors tell when they came; those by which the network, a machine or a storage fails stay as they are.

    Args:
        rank: of this worker.
        moment: what it is at, for people: ``step 4``.
        rows: which rows it has there and where they come from; empty where there are none.
    """
    try:
        yield
    except (RequestError, RunFailed, CorruptCheckpoint):
        raise
    except Exception as error:
        own: BaseException = error
        if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
            own = error.cause  # a data task's
        if _is_death(own):
            raise
        at, kind, place = moment(), type(own).__name__, _place(error)
        try:
            on = rows()
        except Exception:  # what is to be told must not get lost because a shard cannot be read
            on = ""
        line = f"worker {rank} failed in {at}: {kind}: {_first_line(own):.200} ({place})"
        raise Fault(at, kind, place, line, on) from error


def _is_death(error: BaseException) -> bool:
    """Whether it is what is seen of a machine, a connection or a storage that fails, so that it may be gone the next time."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(error, OSError | StorageFailed | RayError):
        return True
    return any(sign in str(error).lower() for sign in SIGNS_OF_ANOTHERS_DEATH)


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "?"
    return f"{'/'.join(Path(frames[-1].filename).parts[-3:])}:{frames[-1].lineno}"


class Restarts(DefaultFailurePolicy):
    """Start workers again after a failure, up to ``train.max_failures`` times, but only once after the same fault."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._seen: set[tuple[str, str, str]] = set()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Whether to start again."""
        fault = _fault(training_failed_error)
        if fault is not None and fault.mark in self._seen:
            fault.again = True
            return FailureDecision.RAISE
        if fault is not None:
            self._seen.add(fault.mark)
        return super().make_decision(training_failed_error)


def _fault(error: Any) -> Fault | None:
    """What the first worker's own code raised; nothing where a worker died, which others may have stumbled over."""
    failures = getattr(error, "worker_failures", None) or {}
    if any(isinstance(found, RayActorError) for found in failures.values()):
        return None
    return next((failures[rank] for rank in sorted(failures) if isinstance(failures[rank], Fault)), None)


def cause(error: Any) -> Exception:
    """The first worker's own error as one of ours, or the controller's."""
    ours = getattr(error, "controller_failure", None)
    if isinstance(ours, RequestError | RunFailed):
        return ours
    fault = _fault(error)
    if fault is not None:
        return RunFailed(str(fault))
    failures = getattr(error, "worker_failures", None) or {}
    # A worker that died comes first: the others fail when they cannot reach it.
    for rank in sorted(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank)):
        found = failures[rank]
        while getattr(found, "cause", None) is not None:
            found = found.cause
        if isinstance(found, RequestError | RunFailed):
            return found
        if found is not None:
            return RunFailed(f"worker {rank} failed: {type(found).__name__}: {_first_line(found):.200}")
    return RunFailed(f"the training failed: {_first_line(ours or error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
