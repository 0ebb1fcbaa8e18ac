"""How far generation is, on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

QUIET = 60.0
"""Seconds without a prediction after which the line says so."""


class GenerationProgress:
    """A context that tells a person how far it is, also while nothing comes.

    Args:
        name: what is generated.
        total: prompts, those done before included.
        done: prompts done before.
        waiting: says why nothing may come, in a few words; asked while nothing has come for a while.
        shown: False keeps it silent.
        interval: seconds between two lines where there is no terminal.
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
        self._start = time.monotonic()
        self._first_batch: float | None = None
        self._last_batch = self._start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> GenerationProgress:
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._shown:
            self._thread.join()

    @property
    def seconds(self) -> float:
        """Since the start, with the engines' start."""
        return time.monotonic() - self._start

    @property
    def tokens_per_second(self) -> float:
        """While engines were generating: from the start of the first batch to the end of the last."""
        if self._first_batch is None:
            return 0.0
        return self._tokens / max(self._last_batch - self._first_batch, 1e-9)

    def advance(self, prompts: int, tokens: int, seconds: float) -> None:
        """Count a batch that has come, and that an engine took so long for."""
        self._last_batch = time.monotonic()
        if self._first_batch is None:
            self._first_batch = self._last_batch - seconds
        self._done += prompts
        self._tokens += tokens

    def line(self) -> str:
        """The state as one line.

        >>> GenerationProgress("predictions", total=16, done=0, waiting=lambda: "2 of 2 CPUs free").line()
        'generate predictions | 0/16 prompts | engines start, then a first batch (2 of 2 CPUs free) | 0:00:00 so far'
        """
        parts = [f"generate {self._name}", f"{self._done}/{self._total} prompts"]
        if self._first_batch is None:
            return " | ".join(
                [*parts, f"engines start, then a first batch ({self._waiting()})", f"{_clock(self.seconds)} so far"]
            )
        now = time.monotonic()
        left = (now - self._first_batch) * (self._total - self._done) / (self._done - self._before)
        parts += [f"{self.tokens_per_second:.0f} tok/s", f"{_clock(left)} left"]
        if now - self._last_batch > QUIET and self._done < self._total:
            parts.append(f"nothing came for {_clock(now - self._last_batch)} ({self._waiting()})")
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
