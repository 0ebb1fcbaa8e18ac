"""Axes of charts whose values are settings or results: linear, logarithmic or with categories."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysft.report.curves import number_text, ticks
from raysft.report.read_run import finite
from raysft.report.text import shortened, visible

LOG_RATIO = 8.0
"""Ratio of the largest to the smallest value from which positive values are drawn on a logarithmic axis."""
MAX_NAMED = 8
"""Largest number of listed values that have a mark each."""
ROBUST_FROM = 8
"""Number of results from which outliers are cut off."""


@dataclass(frozen=True)
class Axis:
    """Where values stand on an axis, from 0 to 1."""

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    categories: tuple[str, ...] = ()
    """The values, as text, of an axis with categories."""
    named: tuple[float, ...] = ()
    """The values of an axis that has marks at them alone."""
    whole: bool = False
    """Marks at integers alone."""

    @classmethod
    def of(cls, values: Sequence[Any], log: bool | None = None, listed: bool = False) -> Axis:
        """An axis for settings.

        Args:
            values: at least one. If one of them is not a number, all are categories.
            log: None decides by the values.
            listed: the values are those of a list, so that marks stand at them if they are few.
        """
        numbers = [number for value in values if (number := finite(value)) is not None]
        if len(numbers) < len(values):
            return cls(categories=tuple(dict.fromkeys(sorted(map(category, values)))))
        low, high = min(numbers), max(numbers)
        logarithmic = low > 0 and high > low and (high / low >= LOG_RATIO if log is None else log)
        distinct = tuple(sorted(set(numbers)))
        named = distinct if listed and len(distinct) <= MAX_NAMED else ()
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        return cls._padded(low, high, log=logarithmic, named=named)

    @classmethod
    def of_numbers(cls, last: int) -> Axis:
        """An axis for the numbers of trials, from 0."""
        return cls(-0.5, last + 0.5, whole=True)

    @classmethod
    def of_results(cls, values: Sequence[float], lowest_is_best: bool) -> Axis:
        """A linear axis for results, at least one. Results far worse than most are cut off: they would flatten all others."""
        signed = np.array(values) * (1 if lowest_is_best else -1)
        best, worst = float(signed.min()), robust_limit(signed)
        low, high = (best, worst) if lowest_is_best else (-worst, -best)
        return cls._padded(low, high)

    @classmethod
    def _padded(cls, low: float, high: float, **kind: Any) -> Axis:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(low - margin, high + margin, **kind)

    def place(self, value: Any) -> float:
        """Where a value stands; values beyond the axis stand at its end."""
        if self.categories:
            return (self.categories.index(category(value)) + 0.5) / len(self.categories)
        number = math.log10(value) if self.log else float(value)
        if self.high == self.low:
            return 0.5
        return min(1.0, max(0.0, (number - self.low) / (self.high - self.low)))

    def beyond(self, value: float) -> bool:
        """Return True if a value is beyond the axis."""
        return not self.categories and not self.log and not self.low <= value <= self.high

    def marks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` marks: (place, text). A category always has one.

        >>> [text for _, text in Axis.of([1e-5, 1e-3]).marks(3)]
        ['1e-05', '0.0001', '0.001']
        >>> [text for _, text in Axis.of([8, 64, 16], listed=True).marks(3)]
        ['8', '16', '64']
        >>> [text for _, text in Axis.of([2e-4, 9e-4], log=True).marks(5)]
        ['0.0002', '0.0004', '0.0006', '0.0008']
        """
        if self.categories:
            return [(self.place_of_category(text), text) for text in self.categories]
        values = self.named or (self._log_marks(count) if self.log else ticks(self.low, self.high, count))
        return [(self.place(value), number_text(value)) for value in values if not self.whole or value == int(value)]

    def place_of_category(self, text: str) -> float:
        """Where a category stands."""
        return (self.categories.index(text) + 0.5) / len(self.categories)

    def _log_marks(self, count: int) -> list[float]:
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        inside: list[float] = []
        for factors in ((1, 2, 5), (1, 3), (1,)):
            values = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
            inside = [value for value in values if self.low <= math.log10(value) <= self.high]
            if len(inside) <= count:
                # Within a decade, round numbers are closer to each other.
                return inside if len(inside) > 2 else ticks(10**self.low, 10**self.high, count)
        return inside[:: math.ceil(len(inside) / count)]


def robust_limit(values: np.ndarray) -> float:
    """The largest value that is not far from the others.

    Args:
        values: [results] finite, the lowest is the best.

    >>> robust_limit(np.array([*range(10), 1000.0])), robust_limit(np.array([1.0, 1000.0]))
    (22.5, 1000.0)
    """
    highest = float(values.max())
    if len(values) < ROBUST_FROM:
        return highest
    lower, median, upper = np.percentile(values, [25, 50, 75])
    return min(highest, float(max(upper + 3 * (upper - lower), median + 3 * (median - values.min()))))


def category(value: Any) -> str:
    """A setting as the text that an axis has for it.

    >>> category("adamw"), category(True), category([1, 2])
    ('adamw', 'true', '[1, 2]')
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shortened(visible(text), 24)
