"""The metrics of several runs, and which differences from the first run are larger than their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raysft.report.comparison import Comparison, compare
from raysft.report.headline import interval_text
from raysft.report.runs import Run

Interval = tuple[float, float]
Paired = Mapping[tuple[str, str], Interval]
"""(source, metric) → 95% interval of a run's difference from the first run over the same prompts."""


@dataclass(frozen=True)
class Cell:
    """One metric of one run."""

    value: str
    interval: str
    """The 95% interval of the value; empty without one."""
    change: str
    """Difference from the first run; empty for the first run itself."""
    test: str
    """How the difference was judged: ``paired``, ``intervals``, or empty if the metric has no interval."""
    differs: bool | None
    """True if the difference is larger than its uncertainty; None if that is not known."""
    better: bool | None
    """True if the value is better than the first run's; None if it is the same, or the direction is unknown."""
    best: bool
    """True for the best value of all runs."""
    difference: str = ""
    """The 95% interval of the difference; empty unless the test is paired."""


@dataclass(frozen=True)
class MetricTable:
    """The metrics of all runs on one source, or over all sources."""

    source: str
    metrics: list[str]
    rows: list[tuple[Run, list[Cell | None]]]
    """For each run, a cell for each metric; None if the run does not have it."""


def metric_tables(runs: Sequence[Run], paired: Mapping[int, Paired]) -> list[MetricTable]:
    """Compare all metrics of the runs with those of the first run.

    Args:
        runs: the runs; the first is the one that the others are compared with.
        paired: intervals of differences from the first run, by the number of the run.
    """
    found = [{(row.source, row.metric): row for row in compare(run.log)} for run in runs]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    tables = []
    for source in sorted(dict.fromkeys(source for source, _ in keys), key=bool):
        metrics = [metric for place, metric in keys if place == source]
        best = {metric: _best([rows.get((source, metric)) for rows in found]) for metric in metrics}
        rows = []
        for run, own in zip(runs, found, strict=True):
            cells = [
                _cell(
                    own.get((source, metric)),
                    found[0].get((source, metric)) if run.number else None,
                    paired.get(run.number, {}).get((source, metric)),
                    best[metric],
                )
                for metric in metrics
            ]
            if any(cells):
                rows.append((run, cells))
        tables.append(MetricTable(source, metrics, rows))
    return tables


def _best(rows: Sequence[Comparison | None]) -> float | None:
    present = [row for row in rows if row]
    directions = {row.higher_is_better for row in present}
    if len({row.after for row in present}) < 2 or len(directions) != 1 or None in directions:
        return None
    return (max if directions == {True} else min)(row.after for row in present)


def _cell(row: Comparison | None, first: Comparison | None, paired: Interval | None, best: float | None) -> Cell | None:
    if row is None:
        return None
    change, test, differs, better, difference = "", "", None, None, ""
    if first is not None:
        versus = replace(row, before=first.after, before_interval=first.after_interval)
        change, better = versus.change, versus.better
        if paired:
            test, differs = "paired", paired[0] > 0 or paired[1] < 0
            difference = interval_text(row, paired)
        elif first.after_interval and row.after_interval:
            test, differs = "intervals", not _overlap(first.after_interval, row.after_interval)
    return Cell(
        row.show(row.after),
        interval_text(row, row.after_interval),
        change,
        test,
        differs,
        better,
        best is not None and row.after == best,
        difference,
    )


def _overlap(one: Interval, other: Interval) -> bool:
    """Return True if two intervals have a point in common.

    >>> _overlap((1.0, 2.0), (2.0, 3.0)), _overlap((1.0, 2.0), (2.1, 3.0))
    (True, False)
    """
    return one[0] <= other[1] and other[0] <= one[1]
