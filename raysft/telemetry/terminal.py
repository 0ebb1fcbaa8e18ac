"""Terminal output of a run: lines, and a progress bar with the remaining time. Imports nothing of raysft."""

from __future__ import annotations

import os
import sys
from typing import Any

import rich.console
import rich.progress


class Console(rich.console.Console):
    """A console whose reader may disappear (``| head``, a lost connection) without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # At exit the interpreter flushes stdout, and would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal:
    """Prints lines; on a terminal it also shows a progress bar below them."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            self._console.on_broken_pipe()

    def advance(self, activity: str, done: int, total: int) -> None:
        """Set the bar to ``done`` of ``total``; does nothing if stdout is not a terminal."""
        if not self._console.is_terminal:
            return
        if self._bar is None:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TimeElapsedColumn(),
                rich.progress.TextColumn("left"),
                rich.progress.TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task(activity, total=total)
            self._bar.start()
        self._bar.update(self._task, description=activity, completed=done, total=total)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """Format seconds as H:MM:SS.

    >>> duration(75), duration(3675)
    ('0:01:15', '1:01:15')
    """
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
