"""Rank configurations by the results of their trials, with the noise of seeds. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysft.config.tune import TuneSection
from raysft.errors import RequestError
from raysft.metric_names import directions

SIGNIFICANCE = 0.05
"""Largest probability of a difference by chance at which two configurations are told apart."""


@dataclass(frozen=True)
class Objectives:
    """What trials are compared by."""

    metrics: tuple[str, ...]
    signs: tuple[float, ...]
    """1 where the lowest value is best, -1 where the highest is."""

    @classmethod
    def of(cls, tune: TuneSection) -> Objectives:
        """Read ``tune.metric`` and ``tune.mode``.

        Raises:
            RequestError: they do not match.
        """
        metrics = tune.metrics
        highest = directions(metrics, tune.mode)
        if len(highest) != len(metrics):
            raise RequestError(
                f"tune.mode={tune.mode} has {len(highest)} items, but tune.metric has {len(metrics)}; give one for each metric"
            )
        if twice := next((metric for metric in metrics if metrics.count(metric) > 1), None):
            raise RequestError(f"tune.metric={metrics} has {twice} twice; keep one")
        return cls(tuple(metrics), tuple(-1.0 if each else 1.0 for each in highest))

    @property
    def modes(self) -> list[str]:
        """``min`` or ``max`` for each metric."""
        return ["min" if sign > 0 else "max" for sign in self.signs]

    def __str__(self) -> str:
        return ", ".join(f"{mode} {metric}" for mode, metric in zip(self.modes, self.metrics, strict=True))

    def values(self, results: Mapping[str, Any]) -> tuple[float, ...] | None:
        """Return the metrics of a trial; None if one of them is missing or not finite."""
        found = tuple(results.get(metric) for metric in self.metrics)
        if all(isinstance(value, int | float) and math.isfinite(value) for value in found):
            return tuple(float(value) for value in found if value is not None)
        return None

    def cost(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return metrics such that the lowest value is best in each."""
        return tuple(sign * value for sign, value in zip(self.signs, values, strict=True))


@dataclass(frozen=True)
class Ranked:
    """A configuration, with the results of its trials."""

    configuration: str
    values: dict[str, Any]
    """Value by dotted key."""
    trials: tuple[str, ...]
    """Names of the trials that have results."""
    results: tuple[tuple[float, ...], ...]
    """``[trials, metrics]``."""
    on_front: bool = False
    """True if no other configuration is as good in all metrics and better in one."""

    @property
    def means(self) -> tuple[float, ...]:
        """Mean over trials, ``[metrics]``."""
        return tuple(statistics.fmean(column) for column in zip(*self.results, strict=True))

    @property
    def deviations(self) -> tuple[float, ...] | None:
        """Standard deviation of a sample, ``[metrics]``; None for a single trial."""
        if len(self.results) < 2:
            return None
        return tuple(statistics.stdev(column) for column in zip(*self.results, strict=True))


def ranked(configurations: Sequence[Ranked], objectives: Objectives) -> list[Ranked]:
    """Sort configurations by the mean of the first metric, the best first, with the Pareto front of all metrics before the rest."""
    costs = {one.configuration: objectives.cost(one.means) for one in configurations}
    marked = [
        Ranked(
            one.configuration,
            one.values,
            one.trials,
            one.results,
            not any(_dominates(cost, costs[one.configuration]) for cost in costs.values()),
        )
        for one in configurations
    ]
    return sorted(marked, key=lambda one: (not one.on_front, costs[one.configuration]))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """True if costs are nowhere higher than others and lower somewhere.

    >>> _dominates((1, 2), (1, 3)), _dominates((1, 2), (1, 2)), _dominates((1, 2), (2, 1))
    (True, False, False)
    """
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def welch_test(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the probability that means of two samples differ as much by chance (two-sided).

    Welch's t-test (1947), for samples whose variances may differ.

    Returns:
        None if a sample has fewer than two values.
    """
    if min(len(first), len(second)) < 2:
        return None
    shares = [statistics.variance(sample) / len(sample) for sample in (first, second)]
    difference = abs(statistics.fmean(first) - statistics.fmean(second))
    if not sum(shares):
        return 1.0 if not difference else 0.0
    from mpmath import betainc

    freedom = sum(shares) ** 2 / sum(
        share**2 / (len(sample) - 1) for share, sample in zip(shares, (first, second), strict=True)
    )
    # P(|T| > t) is the regularized incomplete beta function at ν / (ν + t²), with ν/2 and 1/2.
    return float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + difference**2 / sum(shares)), regularized=True))


def indistinguishable(first: Ranked, second: Ranked) -> bool:
    """True if the first metric of two configurations differs by no more than their repeats do."""
    p = welch_test([row[0] for row in first.results], [row[0] for row in second.results])
    return p is not None and p > SIGNIFICANCE


def mean(results: Sequence[tuple[float, ...]]) -> tuple[float, ...] | None:
    """Return the mean of trials' metrics, ``[trials, metrics]``; None without trials.

    >>> mean([(1.0, 2.0), (3.0, 6.0)])
    (2.0, 4.0)
    """
    return tuple(statistics.fmean(column) for column in zip(*results, strict=True)) if results else None
