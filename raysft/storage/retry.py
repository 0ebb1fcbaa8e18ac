"""Retry storage operations for a bounded time; raise at once what waiting cannot fix."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from raysft.errors import StorageFailed, StorageSilent, one_line

RETRY_SECONDS = 600.0
"""Longest time to retry a storage operation."""
FIRST_SECONDS = 45.0
"""The same for the first operations of a command: if a storage never answered, the address is probably wrong."""
NOTIFY_SECONDS = 60.0
"""Time between two lines about the same wait."""
LONGEST_PAUSE_SECONDS = 15.0

_PERMANENT = re.compile(
    r"ACCESS_DENIED|NO_SUCH|NOT_FOUND|SIGNATURE|INVALID_|MISSING_|UNRECOGNIZED_CLIENT|EXPIRED|QUOTA"
    r"|HTTP status 4(?!08|29)\d\d|Unable to load|No space left|Permission denied|Unauthenticated",
    re.IGNORECASE,
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class RetryPolicy:
    """Time limit of retries, and where to report them."""

    seconds: float | None = None
    """Longest time to retry one operation. Default: ``RETRY_SECONDS``."""
    notify: Callable[[str], None] = print
    """Receives a line that names the file and the reason."""


_policy: ContextVar[RetryPolicy | None] = ContextVar("retry_policy", default=None)


@contextmanager
def retry_for(seconds: float | None = None, notify: Callable[[str], None] = print) -> Iterator[None]:
    """Set how long this thread retries storage operations inside the block; 0: try once."""
    token = _policy.set(RetryPolicy(seconds, notify))
    try:
        yield
    finally:
        _policy.reset(token)


def retry(operation: Callable[[], Result], name: str) -> Result:
    """Call an operation until it succeeds; raise at once what waiting cannot fix.

    Args:
        operation: the call to make.
        name: the file or folder, for messages.

    Raises:
        FileNotFoundError: the file does not exist.
        StorageFailed: the storage refused, or failed until the time limit.
    """
    policy, started, notified, pause = _policy.get() or RetryPolicy(), time.monotonic(), -NOTIFY_SECONDS, 0.5
    seconds = RETRY_SECONDS if policy.seconds is None else policy.seconds
    while True:
        try:
            return operation()
        except FileNotFoundError:
            raise
        except OSError as error:
            waited, reason = time.monotonic() - started, reason_of(error)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # the local disk is full, not the storage
            if _PERMANENT.search(str(error)):
                raise StorageFailed(f"{name}: the storage refuses the request ({reason})") from error
            if waited + pause > seconds:
                raise StorageSilent(f"{name}: no answer from the storage for {waited:.0f} s ({reason})") from error
            if waited - notified >= NOTIFY_SECONDS:
                policy.notify(f"{name}: waiting for the storage, at most {seconds:.0f} s ({reason})")
                notified = waited
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def reason_of(error: BaseException) -> str:
    """Return the message of a filesystem's error in one line."""
    if isinstance(error, StorageFailed):
        return str(error)
    text = getattr(error, "strerror", None) or str(error)
    found = re.search(r"AWS Error .*? during \w+", text, re.DOTALL)
    return one_line(found.group() if found else text or error)
