"""The trials of a running sweep as one table on the terminal, redrawn as they change."""

from __future__ import annotations

import sys
import time
from itertools import compress

import rich.console
import rich.live
import rich.table

from raysft.tune.ranking import Objectives
from raysft.tune.record import TrialRecord
from raysft.tune.trials import described

AROUND = 6
"""Lines of the terminal that are not rows of the table."""
WIDTHS = {"left": 75, "step": 60, "trial": 45}
"""Characters that a terminal must have in a line for these columns; in a narrower one they would leave no room for the values."""


class TrialTable:
    """Shows the trials that run, and as many of the others as the terminal is high, the latest first."""

    def __init__(self, objectives: Objectives, total: int, concurrent: int, console: rich.console.Console) -> None:
        """
        Args:
            objectives: what trials are compared by.
            total: trials of the sweep.
            concurrent: trials at a time.
            console: the terminal.
        """
        self._objectives, self._total, self._concurrent, self._console = objectives, total, concurrent, console
        self._records: dict[str, TrialRecord] = {}
        self._live = rich.live.Live(get_renderable=self.render, console=console, refresh_per_second=1, transient=True)
        self._live.start()

    def show(self, record: TrialRecord) -> None:
        """Show a trial that changed."""
        self._records.pop(record.trial, None)
        self._records[record.trial] = record

    def close(self) -> None:
        """Remove the table; what it showed is in the record."""
        self._live.stop()

    def render(self) -> rich.table.Table:
        """Return the table as it is now."""
        table = rich.table.Table(title=self._title(), title_justify="left", title_style="", expand=True)
        names = ("trial", "values", "step", *self._objectives.metrics, "state", "left")
        fits = [self._console.width >= WIDTHS.get(name, 0) for name in names]
        for name in compress(names, fits):
            table.add_column(name, overflow="fold" if name == "values" else "ellipsis", no_wrap=name != "values")
        for record in self._chosen():
            found = [record.metrics.get(metric) for metric in self._objectives.metrics]
            numbers = ["" if value is None else f"{value:.4f}" for value in found]
            steps = record.metrics.get("total_steps")
            step = f"{record.step or 0}" + (f"/{steps:.0f}" if steps else "")
            values = described(record.values) + (
                f", seed {record.seed}" if record.trial != record.configuration else ""
            )
            cells = (str(record.number), values, step, *numbers, record.state, _clock(_left(record)))
            table.add_row(*compress(cells, fits))
        return table

    def _chosen(self) -> list[TrialRecord]:
        """The trials that run, and the latest of the others."""
        chosen = list(self._records.values())[::-1]
        chosen.sort(key=lambda record: record.state != "running")
        return chosen[: max(1, self._console.height - AROUND)]

    def _title(self) -> str:
        states = [record.state for record in self._records.values()]
        parts = [
            f"{states.count(state)} {state}"
            for state in ("done", "stopped", "interrupted", "failed", "running")
            if state in states
        ]
        left = self._seconds_left()
        return f"{self._total} trials: {', '.join(parts)}" + (
            f"; about {_clock(left)} left" if left is not None else ""
        )

    def _seconds_left(self) -> float | None:
        """Of the sweep, if the trials to come take as long as those that ended; None while none has."""
        took = [seconds for record in self._records.values() if (seconds := record.seconds) is not None]
        if not took:
            return None
        mean = sum(took) / len(took)
        running = [record for record in self._records.values() if record.state == "running"]
        waiting = max(0, self._total - len(self._records))
        rest = sum(mean if (left := _left(record)) is None else left for record in running)
        return (waiting * mean + rest) / self._concurrent


def _left(record: TrialRecord) -> float | None:
    """Seconds that a running trial still takes at its speed so far; None if that is not known."""
    steps, step = record.metrics.get("total_steps"), record.step
    if record.state != "running" or not steps or not step:
        return None
    return (time.time() - record.started) * max(0.0, steps - step) / step


def _clock(seconds: float | None) -> str:
    """
    >>> _clock(3725.4), _clock(None)
    ('1:02:05', '')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def trial_table(objectives: Objectives, total: int, concurrent: int) -> TrialTable | None:
    """Return a table on this process's terminal; None if stdout is none."""
    console = rich.console.Console(file=sys.stdout, highlight=False)
    return TrialTable(objectives, total, concurrent, console) if console.is_terminal else None
