"""Failures of workers: which error is the cause, in one line, and whether the workers are restarted."""

from __future__ import annotations

import re
from typing import Any

from ray.exceptions import RayActorError

from raysft.errors import RequestError, RunFailed, RunStopped, one_line
from raysft.train.faults import Fault
from raysft.train.ray_train_internals import (
    DefaultFailurePolicy,
    FailureDecision,
    WorkerGroupStartupFailedError,
)


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
    """Return the failure of each worker, by rank; for one that died, the ``RayActorError`` that Ray Train wraps in its own."""
    failures = getattr(error, "worker_failures", None) or {}
    return {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}


def _fault(error: Any) -> Fault | None:
    """The first worker's fault; None if a worker died, since that may have caused the errors of the others."""
    failures = _failures(error)
    if any(isinstance(failure, RayActorError) for failure in failures.values()):
        return None
    return next((failures[rank] for rank in sorted(failures) if isinstance(failures[rank], Fault)), None)


def _address(died: RayActorError) -> str:
    """The address of a worker's node, which Ray gives in a separate line; empty if it does not."""
    found = re.search(r"^\s*ip: (\S+)$", str(died), re.MULTILINE)
    return f" ({found[1]})" if found else ""


def cause(error: Any) -> Exception:
    """Turn Ray Train's error into one of ours: that of the first worker, or of the controller."""
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
