"""Confidence intervals of scores, by percentile bootstrap over examples.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; for BLEU: Koehn, Statistical Significance Tests
for Machine Translation Evaluation (2004). An interval covers the choice of examples, but not the seeds of training and
sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percentage of the resamples that an interval holds."""
_WEIGHTS = 1 << 22
"""Weights in memory at a time (32 MiB)."""


def totals(statistics: np.ndarray) -> np.ndarray:
    """[statistics] sums over [examples, statistics], each added up exactly as ``np.mean`` adds up one column.

    >>> totals(np.array([[1.0, 10.0], [2.0, 20.0]])).tolist()
    [3.0, 30.0]
    """
    return np.array([column.sum() for column in np.ascontiguousarray(statistics.T)])


def resampled_sums(statistics: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Sums of the statistics over resamples: as many examples as there are, drawn with replacement.

    A resample is a vector that counts how often each example was drawn (multinomial), so that the sums of many resamples
    are one matrix product: 1,000 resamples of 100,000 examples take a few seconds, regardless of the number of metrics.
    The same seed and number of examples give the same draws: two models are compared on the same resamples.

    Args:
        statistics: [examples, statistics], at least one example.
        seed: of the draws.
        resamples: number of resamples.

    Returns:
        [resamples, statistics]
    """
    examples = len(statistics)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, statistics.shape[1]))
    at_once = max(1, _WEIGHTS // examples)
    for start in range(0, resamples, at_once):
        weights = np.empty((min(at_once, resamples - start), examples))
        for drawn in weights:
            drawn[:] = np.bincount(generator.integers(examples, size=examples), minlength=examples)
        sums[start : start + at_once] = weights @ statistics
    return sums


def intervals(resampled: Sequence[Mapping[str, float]], level: float = LEVEL) -> dict[str, tuple[float, float]]:
    """The interval of each score that holds ``level`` percent of the resamples, rounded to 4 places.

    >>> intervals([{"bleu": float(i)} for i in range(101)], level=90)
    {'bleu': (5.0, 95.0)}
    """
    found = {}
    for key in resampled[0] if resampled else ():
        low, high = np.percentile([scores[key] for scores in resampled], [50 - level / 2, 50 + level / 2])
        found[key] = (round(float(low), 4), round(float(high), 4))
    return found
