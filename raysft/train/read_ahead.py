"""The rows of the next step, read in a thread while the current one is computed, so that a wait for them can be interrupted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Reads one item ahead, from the start of the block. A read that never ends is abandoned at the end of the block."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()
        self._held: list[T | BaseException | None] = []
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> ReadAhead[T]:
        self._thread.start()
        self._wanted.put(True)
        return self

    def __exit__(self, *_: object) -> None:
        self._wanted.put(False)

    @property
    def ready(self) -> bool:
        """True if ``take`` would not wait."""
        self.wait(0)
        return bool(self._held)

    @property
    def failed(self) -> bool:
        """True if ``take`` would raise."""
        return self.ready and isinstance(self._held[0], BaseException)

    def wait(self, seconds: float) -> None:
        """Wait until the next item is there, or for this long."""
        if not self._held:
            with suppress(queue.Empty):
                self._held.append(self._read.get(timeout=seconds))

    def take(self) -> T | None:
        """Return the next item, and read the one after it; None after the last one. Raises what reading it raised."""
        item = self._held.pop() if self._held else self._read.get()
        if item is None or isinstance(item, BaseException):
            self._held.append(item)  # nothing comes after it
        else:
            self._wanted.put(True)
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        while self._wanted.get():
            try:
                self._read.put(next(self._items, None))
            except BaseException as error:
                self._read.put(error)
