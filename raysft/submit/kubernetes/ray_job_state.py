"""What KubeRay says of a RayJob, as kubectl prints it. Pure but for the question."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raysft.errors import one_line
from raysft.submit.following import INTERRUPTED
from raysft.submit.kubernetes.kubectl import kubectl
from raysft.submit.shown_log import own_exit_code

COMPLETE, FAILED, INVALID, RETRYING = "Complete", "Failed", "ValidationFailed", "Retrying"
ENDED = (COMPLETE, FAILED, INVALID)


@dataclass(frozen=True)
class RayJobState:
    """A RayJob at one moment. What KubeRay does not know yet is empty."""

    deployment: str
    """What KubeRay does with it: ``Initializing``, ``Running``, ``Retrying``, … and at the end one of ``ENDED``."""
    job: str
    """Ray's own status of the job: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``."""
    job_id: str
    """Submission id; each attempt has its own."""
    head: str
    """Pod of the head."""
    reason: str
    """Why it failed, in one word of KubeRay's."""
    message: str
    failures: int
    """Attempts that have failed."""
    attempts: int
    """Most attempts."""

    @property
    def ended(self) -> bool:
        """True if nothing more happens."""
        return self.deployment in ENDED

    def exit_code(self, log: str) -> int:
        """The exit code for a job that has ended or will be tried again: its driver's own, if anybody tells it.

        Args:
            log: the end of what it has printed.
        """
        if self.job == "SUCCEEDED" and self.deployment == COMPLETE:
            return 0
        if self.job == "STOPPED":
            named = own_exit_code(log)
            return INTERRUPTED if named is None else named
        # Ray says it in words, and KubeRay passes them on: negative for a process that a signal has ended.
        found = re.match(r"Job entrypoint command failed with exit code (-?\d+)", self.message)
        code = int(found[1]) if found else 1
        return code if code >= 0 else 128 - code

    def ending(self, log: str) -> str:
        """How it has ended, as a participle."""
        if self.job == "SUCCEEDED" and self.deployment == COMPLETE:
            return "succeeded"
        if self.job == "STOPPED":
            named = own_exit_code(log)
            return "been stopped" if named is None else f"ended with exit code {named}"
        if self.reason in ("", "AppFailed") and self.job == "FAILED":
            return f"failed with exit code {self.exit_code(log)}"
        return f"failed ({self.reason or self.deployment}{f': {one_line(self.message)}' if self.message else ''})"


def ask(name: str, namespace: list[str]) -> RayJobState | None:
    """Ask Kubernetes for a RayJob; None if there is none.

    Raises:
        RequestError: kubectl had no answer.
    """
    printed = kubectl("get", "rayjob", name, *namespace, "--ignore-not-found", "--output", "json")
    return parse(json.loads(printed)) if printed.strip() else None


def parse(document: Mapping[str, Any]) -> RayJobState:
    """Read a RayJob's document.

    >>> parse({"spec": {"backoffLimit": 3}, "status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}).job
    'RUNNING'
    """
    status = document.get("status") or {}
    return RayJobState(
        deployment=status.get("jobDeploymentStatus", ""),
        job=status.get("jobStatus", ""),
        job_id=status.get("jobId", ""),
        head=((status.get("rayClusterStatus") or {}).get("head") or {}).get("podName", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        failures=status.get("failed") or 0,
        attempts=1 + ((document.get("spec") or {}).get("backoffLimit") or 0),
    )
