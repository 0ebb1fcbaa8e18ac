"""What raysft raises."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The request was right and the run failed all the same. The command exits with code 1."""


class RequestError(ValueError):
    """The request is wrong: one line with the fact, the value and the remedy. The command exits with code 2."""


class StorageFailed(RuntimeError):
    """A storage refuses, or did not answer for as long as it was waited for."""
