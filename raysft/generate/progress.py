"""Report the progress of generation on stderr: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET = 60.0
"""Seconds without a prediction after which the line mentions it."""


class GenerationProgress:
    """Context manager that reports progress, also while no predictions arrive.

    Predictions may arrive before it is entered, when the engines are ahead of what is shown.

    Args:
        name: name of the output.
        total: number of prompts, including those done before.
        done: number of prompts done before.
        waiting: gives a short reason why nothing may arrive; called after a while without predictions.
        shown: whether to print anything.
        interval: seconds between two lines without a terminal.
    """

    def __init__(
        self,
        name: str,
        *,
        total: int,
        done: int,
        waiting: Callable[[], str],
        shown: bool = True,
        interval: float = 10.0,
    ) -> None:
        self._name, self._total, self._done, self._before = name, total, done, done
        self._waiting, self._shown, self._interval = waiting, shown, interval
        self._tokens = 0
        self._start: float | None = None
        self._first_batch: float | None = None
        self._last_batch = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> GenerationProgress:
        self._start = self._first_batch or time.monotonic()
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._shown:
            self._thread.join()

    @property
    def seconds(self) -> float:
        """Seconds since it was entered, including the start of the engines, or since its first batch began if that was earlier."""
        start = self._start or self._first_batch
        return time.monotonic() - start if start else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second from the start of the first batch to the end of the last."""
        if self._first_batch is None:
            return 0.0
        return self._tokens / max(self._last_batch - self._first_batch, 1e-9)

    def advance(self, prompts: int, tokens: int, seconds: float) -> None:
        """Count a batch that took an engine ``seconds``."""
        self._last_batch = time.monotonic()
        if self._first_batch is None:
            self._first_batch = self._last_batch - seconds
        self._done += prompts
        self._tokens += tokens

    def line(self) -> str:
        """Format the state as one line.

        >>> GenerationProgress("predictions", total=16, done=0, waiting=lambda: "2 of 2 CPUs free").line()
        'generate predictions | 0/16 prompts | waiting for engines and the first batch (2 of 2 CPUs free) | 0:00:00 elapsed'
        """
        parts = [f"generate {self._name}", f"{self._done}/{self._total} prompts"]
        if self._first_batch is None:
            return " | ".join(
                [
                    *parts,
                    f"waiting for engines and the first batch ({self._waiting()})",
                    f"{_clock(self.seconds)} elapsed",
                ]
            )
        now = time.monotonic()
        left = (now - self._first_batch) * (self._total - self._done) / (self._done - self._before)
        parts += [f"{self.tokens_per_second:.0f} tok/s", f"{_clock(left)} left"]
        if now - self._last_batch > QUIET and self._done < self._total:
            parts.append(f"no prediction for {_clock(now - self._last_batch)} ({self._waiting()})")
        return " | ".join(parts)

    def _report(self) -> None:
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar(console)
            return
        while not self._stop.wait(self._interval):
            print(self.line(), file=sys.stderr, flush=True)
        print(self.line(), file=sys.stderr, flush=True)

    def _bar(self, console: Console) -> None:
        with Progress(TextColumn("{task.description}"), BarColumn(), console=console) as bar:
            task = bar.add_task(self.line(), total=self._total, completed=self._done)
            while not self._stop.wait(1.0):
                bar.update(task, completed=self._done, description=self.line())
            bar.update(task, completed=self._done, description=self.line())


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
