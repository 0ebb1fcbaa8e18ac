"""Ends generation during training when it stops making progress; while it makes progress, tells those who wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from raysft.stopping import Stopping

PATIENCE = 3
"""How many times ``train.hang_minutes`` may pass without progress. Workers that wait for predictions end themselves after four
times that; this comes earlier, and says what hangs."""


class GenerationGuard:
    """A thread that watches generation: it may continue while engines show signs of life, predictions arrive or scoring runs."""

    def __init__(
        self,
        stopping: Stopping,
        hang_minutes: float | None,
        tell: Callable[[int, int], None],
        give_up: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        Args:
            stopping: of the generation; asked to end it.
            hang_minutes: ``train.hang_minutes``; None to never end it.
            tell: gets the numbers of predictions and of signs of life so far, whenever they grow.
            give_up: gets the reason if generation was asked to end but does not: a metric hangs.
        """
        self._stopping, self._tell, self._give_up = stopping, tell, give_up
        self._seconds = PATIENCE * 60 * hang_minutes if hang_minutes else None
        self._lock = threading.Lock()
        self._predictions = self._signs = 0
        self._progressed = time.monotonic()
        self._clock: int | None = None
        """CPU clock of the thread that scores, once it scores."""
        self.reason = ""
        """What hangs; empty while nothing does."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation guard", daemon=True)

    def __enter__(self) -> GenerationGuard:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # messages still under way must not arrive after generation has ended
            self._done.set()
        self._thread.join()

    def advanced(self, predictions: int) -> None:
        """Note how many predictions there are."""
        self._note(predictions)

    def heard(self) -> None:
        """Note a sign of life."""
        self._note(None)

    def scoring(self) -> None:
        """Note that this thread starts scoring."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._note(None)

    def _note(self, predictions: int | None) -> None:
        with self._lock:
            if self._done.is_set():
                return
            self._progressed = time.monotonic()
            self._signs += 1
            self._predictions = self._predictions if predictions is None else predictions
            self._tell(self._predictions, self._signs)

    @property
    def idle(self) -> float:
        """Seconds without progress."""
        return time.monotonic() - self._progressed

    def _run(self) -> None:
        used, given_up = 0.0, False
        every = 5.0 if self._seconds is None else min(5.0, self._seconds / 20)
        while not self._done.wait(every):
            if self._clock is not None and (now := time.clock_gettime(self._clock)) > used:
                used = now
                self.heard()
            if self._seconds is not None and self.idle > self._seconds and not self.reason:
                what = "no engine is responding" if self._clock is None else "scoring stands still"
                self.reason = f"{what} for {self._seconds / 60:g} minutes ({PATIENCE} × train.hang_minutes)"
                self._stopping.ask(self.reason)
            if self._seconds is not None and self.idle > self._seconds * (1 + 1 / PATIENCE) and not given_up:
                given_up = True
                self._give_up(self.reason)
