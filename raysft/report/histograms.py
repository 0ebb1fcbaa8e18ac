"""Histograms over all predictions, for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from raysft.report.curves import ticks
from raysft.report.predictions import SCORE_BINS, Predictions

BARS = 12
"""Approximate number of bars in a histogram of lengths."""
MAX_STOPS = 10
"""Number of stop reasons that are shown."""


@dataclass(frozen=True)
class Histogram:
    """Counts of one quantity in several groups of texts."""

    title: str
    names: list[str]
    """The groups: after (or predicted), before, reference."""
    rows: list[tuple[str, list[tuple[int, float]]]]
    """Label, and for each group its count and the fraction of all its counts."""

    @property
    def largest(self) -> float:
        """The largest fraction, which has the longest bar."""
        return max((fraction for _, counts in self.rows for _, fraction in counts), default=0.0) or 1.0


def histograms(predictions: Predictions, name: str = "after") -> list[Histogram]:
    """All histograms that have data.

    Args:
        predictions: of the run.
        name: what to call the predictions of the trained or other model.
    """
    after, before = predictions.after, predictions.before
    characters = {name: after.characters, "before": before.characters, "reference": after.references}
    charts = [
        _of_scores({name: after.scores, "before": before.scores}),
        _of_lengths("Length in characters", characters),
        _of_lengths("Length in tokens", {name: after.tokens, "before": before.tokens}),
        _of_stops({name: after.stops, "before": before.stops}),
    ]
    return [histogram for histogram in charts if histogram]


def _of_scores(counters: Mapping[str, Counter[int]]) -> Histogram | None:
    labels = [f"{number / SCORE_BINS:g} – {(number + 1) / SCORE_BINS:g}" for number in range(SCORE_BINS)]
    return _histogram("Word F1 with the reference", counters, [*enumerate(labels)])


def _of_stops(counters: Mapping[str, Counter[str]]) -> Histogram | None:
    together = Counter[str]()
    for counter in counters.values():
        together.update(counter)
    return _histogram("Stop reason", counters, [(stop, stop) for stop, _ in together.most_common(MAX_STOPS)])


def _of_lengths(title: str, counters: Mapping[str, Counter[int]]) -> Histogram | None:
    """Bars of equal width up to the 99th percentile. Longer texts share the last bar."""
    together = Counter[int]()
    for counter in counters.values():
        together.update(counter)
    if not together:
        return None
    high, beyond = max(together), together.total() // 100
    for length in sorted(together, reverse=True):
        beyond -= together[length]
        if beyond < 0:
            high = length
            break
    marks = ticks(0, high + 1, BARS)
    width = max(1, round(marks[1] - marks[0])) if len(marks) > 1 else 1
    bars = high // width + 1
    bins = {name: Counter[int]() for name in counters}
    for name, counter in counters.items():
        for length, count in counter.items():
            bins[name][min(length // width, bars)] += count
    labels = [
        (bar, f"{bar * width:,}" if width == 1 else f"{bar * width:,} – {(bar + 1) * width - 1:,}")
        for bar in range(bars)
    ]
    if any(counter[bars] for counter in bins.values()):
        labels.append((bars, f"{bars * width:,} and more"))
    return _histogram(title, bins, labels)


def _histogram(
    title: str, counters: Mapping[str, Counter], labels: list[tuple[int, str]] | list[tuple[str, str]]
) -> Histogram | None:
    """One row for each labelled key. Groups without counts are omitted."""
    groups = {name: counter for name, counter in counters.items() if counter.total()}
    if not groups:
        return None
    rows = [
        (label, [(counter[key], counter[key] / counter.total()) for counter in groups.values()])
        for key, label in labels
    ]
    return Histogram(title, list(groups), rows)
