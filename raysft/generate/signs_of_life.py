"""Signs of life of a generation, for somebody who waits for it and must tell long work from a hang."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MOST_SECONDS = 30.0
"""Most time between two looks of an engine at itself."""
BUSY = 0.05
"""Share of a CPU from which a process counts as busy: Ray's own threads need less."""
READ_BYTES = 1 << 20
"""Bytes between two looks from which a process counts as reading."""


@dataclass(frozen=True)
class Listener:
    """What is told of a generation while it runs."""

    advanced: Callable[[int], None] = lambda predictions: None
    """Gets the number of predictions so far, of the output whose turn it is."""
    scoring: Callable[[], None] = lambda: None
    """Called when all predictions are there, and this thread begins to score them."""
    engine: Callable[[], None] | None = None
    """Called in an engine's process while it loads a model or computes tokens, so it must be possible to send. vLLM's engines are
    known by their predictions alone."""


class Work(NamedTuple):
    """What a process has done so far."""

    cpu_seconds: float
    read: int
    """Bytes from files."""
    faults: int
    """Pages of mapped files that it waited for."""

    @classmethod
    def now(cls) -> Work:
        """Look at this process."""
        times, read = os.times(), 0
        with suppress(OSError, ValueError, IndexError):  # not every system tells
            read = int(Path("/proc/self/io").read_text(encoding="ascii").split()[1])
        return cls(times.user + times.system, read, resource.getrusage(resource.RUSAGE_SELF).ru_majflt)

    def goes_on(self, before: Work, seconds: float) -> bool:
        """Return True if the process has worked since an earlier look.

        >>> Work(9.0, 0, 0).goes_on(Work(8.0, 0, 0), 10), Work(8.1, 9, 0).goes_on(Work(8.0, 0, 0), 10)
        (True, False)
        """
        busy = self.cpu_seconds - before.cpu_seconds >= BUSY * seconds
        return busy or self.read - before.read >= READ_BYTES or self.faults > before.faults


class SignsOfLife:
    """Tells that an engine is at work: while it loads a model, by what its process does; then by the steps that it has done.

    A process that waits for a GPU in vain keeps a CPU busy, so while tokens are computed only their steps count.
    """

    def __init__(self, tell: Callable[[], None], hang_minutes: float | None) -> None:
        """
        Args:
            tell: called from another thread.
            hang_minutes: ``train.hang_minutes``; it is told more often than that.
        """
        self._tell = tell
        self._seconds = min(MOST_SECONDS, 60 * hang_minutes / 4) if hang_minutes else MOST_SECONDS

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Tell during the block whether the process works."""
        with self._looking(Work.now, lambda now, before: now.goes_on(before, self._seconds)):
            yield

    @contextmanager
    def computing(self, steps: Callable[[], int]) -> Iterator[None]:
        """Tell during the block whether the number of steps changes."""
        with self._looking(steps, lambda now, before: now != before):
            yield

    @contextmanager
    def _looking(self, look: Callable[[], Any], goes_on: Callable[[Any, Any], bool]) -> Iterator[None]:
        done = threading.Event()

        def run() -> None:
            before = look()
            while not done.wait(self._seconds):
                now = look()
                if goes_on(now, before):
                    self._tell()
                before = now

        self._tell()
        thread = threading.Thread(target=run, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
