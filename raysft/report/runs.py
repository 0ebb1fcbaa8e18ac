"""Several runs that are compared: their logs, names that tell them apart, and what of them is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from raysft.errors import RequestError
from raysft.report.comparison import unfinished
from raysft.report.page import progress
from raysft.report.read_run import RunLog, read_run
from raysft.report.text import masked, visible
from raysft.storage.run_directory import RunDirectory

COLORS = 6
"""Number of the page's colors."""
DASHES = ("", "dash", "dot")
"""Styles of curves. Runs beyond the sixth repeat the colors with another style."""


@dataclass(frozen=True)
class Run:
    """One of the runs that are compared."""

    number: int
    """Its place among the runs, from 0, which gives its color and dashes."""
    label: str
    """Its name, or as much of its path as tells it apart from runs of the same name."""
    log: RunLog
    problems: list[str] = field(default_factory=list)
    """A line for each corrupt file, which is left out."""

    @property
    def color(self) -> int:
        """Index of one of the page's colors."""
        return self.number % COLORS

    @property
    def style(self) -> str:
        """CSS class of its curves: how they are dashed."""
        return DASHES[self.number // COLORS % len(DASHES)]


def read_runs(directories: Sequence[RunDirectory]) -> list[Run]:
    """Read the runs to compare; corrupt files are left out.

    Raises:
        RequestError: a folder is not a run directory, or is named twice.
    """
    places = [_place(directory) for directory in directories]
    for place, count in Counter(places).items():
        if count > 1:
            raise RequestError(f"{masked(place)}: named {count} times; name every run once")
    found: list[tuple[RunLog, list[str]]] = []
    for directory in directories:
        if directory.trials.exists():
            raise RequestError(
                f"{directory.place}: a sweep, not a run; report it alone, or name the runs in {directory.place / 'trials'}"
            )
        problems: list[str] = []
        found.append((read_run(directory, problems), problems))
    labels = _labels([log.name for log, _ in found], places)
    return [
        Run(number, label, log, problems)
        for number, (label, (log, problems)) in enumerate(zip(labels, found, strict=True))
    ]


def notes(runs: Sequence[Run]) -> list[str]:
    """What the page leaves out because a run lacks it, and what of a run is not final."""
    parts: list[tuple[str, Callable[[RunLog], Any]]] = [
        ("no training step, so no training loss", lambda log: log.steps),
        ("no evaluation", lambda log: log.evaluations or log.evaluated),
        ("no metrics of generated text", lambda log: log.metrics),
    ]
    lines = []
    for run in runs:
        log = run.log
        facts = [problem.rstrip(".") for problem in run.problems] + [progress(log).rstrip(".")]
        if unfinished(log):
            facts.append(f"no final evaluation, so that of step {log.evaluations[-1]['current_steps']:,} stands for it")
        facts += [fact for fact, part in parts if not part(log) and any(part(other.log) for other in runs)]
        if any(facts):
            lines.append(f"{run.label}: {visible(masked('; '.join(fact for fact in facts if fact)))}.")
    return lines


def _place(directory: RunDirectory) -> str:
    return directory.remote.location if directory.remote else directory.path.resolve().as_posix()


def _labels(names: Sequence[str], places: Sequence[str]) -> list[str]:
    """Names that are unique: the end of the path takes the place of a name that several runs have.

    >>> _labels(["a", "toy", "toy"], ["/x/a", "/x/one/toy", "/y/two/toy"])
    ['a', 'one/toy', 'two/toy']
    """
    counts: dict[Any, int] = Counter(names)
    labels = []
    for name, place in zip(names, places, strict=True):
        label, parts = name, PurePosixPath(masked(place)).parts
        if counts[name] > 1:
            ends = (len(parts) - length for length in range(2, len(parts) + 1))
            same = [PurePosixPath(masked(other)).parts for other in places if other != place]
            start = next((s for s in ends if not any(o[-(len(parts) - s) :] == parts[s:] for o in same)), 0)
            label = "/".join(parts[start:]).replace("//", "/")
        labels.append(visible(label)[:80])
    return labels
