"""Histograms over all predictions, for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from raysft.report.curves import ticks
from raysft.report.predictions import SCORE_PARTS, Predictions

BARS = 12
"""Bars of a histogram of lengths, about."""
MOST_STOPS = 10
"""Reasons to stop that are shown."""


@dataclass(frozen=True)
class Histogram:
    """Counts of the same kind from one origin or several."""

    title: str
    names: list[str]
    """The origins: after (or predicted), before, reference."""
    rows: list[tuple[str, list[tuple[int, float]]]]
    """Label, and for each origin the count and its share of all counts of that origin."""

    @property
    def most(self) -> float:
        """The largest share: the longest bar."""
        return max((share for _, counts in self.rows for _, share in counts), default=0.0) or 1.0


def histograms(predictions: Predictions, name: str = "after") -> list[Histogram]:
    """Those that there is something to count for; ``name``: what the predictions are called that are not those before."""
    after, before = predictions.after, predictions.before
    characters = {name: after.characters, "before": before.characters, "reference": after.references}
    found = [
        _of_scores({name: after.scores, "before": before.scores}),
        _of_lengths("Length in characters", characters),
        _of_lengths("Length in tokens", {name: after.tokens, "before": before.tokens}),
        _of_stops({name: after.stops, "before": before.stops}),
    ]
    return [histogram for histogram in found if histogram]


def _of_scores(counters: Mapping[str, Counter[int]]) -> Histogram | None:
    labels = [f"{part / SCORE_PARTS:g} – {(part + 1) / SCORE_PARTS:g}" for part in range(SCORE_PARTS)]
    return _histogram("Word F1 with the reference", counters, [*enumerate(labels)])


def _of_stops(counters: Mapping[str, Counter[str]]) -> Histogram | None:
    together = Counter[str]()
    for counter in counters.values():
        together.update(counter)
    return _histogram("Why it stopped", counters, [(stop, stop) for stop, _ in together.most_common(MOST_STOPS)])


def _of_lengths(title: str, counters: Mapping[str, Counter[int]]) -> Histogram | None:
    """Bars of one width up to where all but a hundredth lie; what is longer shares the last bar."""
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
    parts = {name: Counter[int]() for name in counters}
    for name, counter in counters.items():
        for length, count in counter.items():
            parts[name][min(length // width, bars)] += count
    labels = [
        (bar, f"{bar * width:,}" if width == 1 else f"{bar * width:,} – {(bar + 1) * width - 1:,}")
        for bar in range(bars)
    ]
    if any(counter[bars] for counter in parts.values()):
        labels.append((bars, f"{bars * width:,} and more"))
    return _histogram(title, parts, labels)


def _histogram(
    title: str, counters: Mapping[str, Counter], labels: list[tuple[int, str]] | list[tuple[str, str]]
) -> Histogram | None:
    """Rows of the labelled keys; origins without any count are left out."""
    there = {name: counter for name, counter in counters.items() if counter.total()}
    if not there:
        return None
    rows = [
        (label, [(counter[key], counter[key] / counter.total()) for counter in there.values()]) for key, label in labels
    ]
    return Histogram(title, list(there), rows)
