"""A run that is asked to end before its end: one place that knows it, which all stages ask.

Signals, drained nodes, a time limit, a file and a sweep ask (``run.stop_sources``). A training then saves a checkpoint and
ends; the other stages end where what they have done is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from raysft.errors import RunStopped


@dataclass(frozen=True)
class StopRequest:
    """Why a run must end."""

    reason: str
    """For messages: ``SIGTERM``."""
    until: float | None = None
    """When the machine goes, in seconds since 1970; None if that is not known."""
    elsewhere: bool = False
    """True if only this machine goes, so that the run could continue elsewhere at once."""


class Stopping:
    """Whether a run must end soon. The first request counts; a later one may only add when the machine goes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[StopRequest], None]] = []
        self.request: StopRequest | None = None
        """None while the run may continue."""
        self.finishing = 0
        """Above 0 while the work under way comes to an orderly end by itself after a request; else a signal interrupts it."""

    def ask(self, reason: str, until: float | None = None, elsewhere: bool = False) -> None:
        """Ask the run to end; any thread may, but no signal handler: it could wait for what it has interrupted."""
        with self._lock:
            if self.request is not None:
                known = self.request.until
                self.request = replace(self.request, until=until if known is None else known)
                return
            self.request = StopRequest(reason, until, elsewhere)
            listeners = list(self._listeners)
        for listener in listeners:
            listener(self.request)

    @contextmanager
    def telling(self, listener: Callable[[StopRequest], None]) -> Iterator[None]:
        """Call a function once the run is asked to end, from the thread that asks; at once if it was before."""
        with self._lock:
            self._listeners.append(listener)
            request = self.request
        if request is not None:
            listener(request)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)

    @contextmanager
    def ending_by_itself(self) -> Iterator[None]:
        """Keep signals from interrupting the block: it ends by itself when the run is asked to."""
        self.check()
        with self._lock:
            self.finishing += 1
        try:
            yield
        finally:
            with self._lock:
                self.finishing -= 1

    def check(self, kept: str = "") -> None:
        """End here if the run was asked to.

        Args:
            kept: what is kept, for the message.

        Raises:
            RunStopped: it was.
        """
        if self.request is not None:
            raise RunStopped(f"stopped: {self.request.reason}" + (f"; {kept}" if kept else ""))


_current: ContextVar[Stopping | None] = ContextVar("stopping", default=None)


def current() -> Stopping:
    """Return what the run of this thread asks; outside of a run one that nobody tells anything."""
    return _current.get() or Stopping()


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """Make the block a run that can be asked to end, or a part of the one around it."""
    stopping = current()
    token = _current.set(stopping)
    try:
        yield stopping
    finally:
        _current.reset(token)
