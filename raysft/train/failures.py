"""What Ray Train raises → what happened, in one line."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError

from raysft.config import RequestError
from raysft.records import RunFailed


def cause(error: Any) -> Exception:
    """The first worker's own error as one of ours, or the controller's."""
    ours = getattr(error, "controller_failure", None)
    if isinstance(ours, RequestError | RunFailed):
        return ours
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
