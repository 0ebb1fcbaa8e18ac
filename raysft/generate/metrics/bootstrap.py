"""How much a figure would vary with other examples of the same kind: percentile bootstrap over examples.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; for BLEU: Koehn, Statistical Significance Tests
for Machine Translation Evaluation (2004). It says nothing of how figures vary with the seed of training or of sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 95.0
"""Percent of the resamples that an interval holds."""
_WEIGHTS = 1 << 22
"""Weights in memory at a time (32 MiB)."""


def totals(statistics: np.ndarray) -> np.ndarray:
    """[statistics] sums over [examples, statistics], each added up just as ``np.mean`` adds up one column.

    >>> totals(np.array([[1.0, 10.0], [2.0, 20.0]])).tolist()
    [3.0, 30.0]
    """
    return np.array([column.sum() for column in np.ascontiguousarray(statistics.T)])


def resampled_sums(statistics: np.ndarray, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Sums of the statistics over examples drawn anew, as many as there are, with replacement.

    A resample is how often each example was drawn (multinomial), and all sums of many resamples are one product of
    matrices: with 100,000 examples a thousand resamples take a few seconds, whatever the number of metrics.
    The same seed and number of examples give the same draws, so that two models are compared on the same resamples.

    Args:
        statistics: [examples, statistics], at least one example.
        seed: of the draws.

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


def intervals(resampled: Sequence[Mapping[str, float]], level: float = LEVEL) -> dict[str, float]:
    """``{key}_low`` and ``{key}_high`` of each figure, between which ``level`` percent of the resamples lie.

    >>> intervals([{"bleu": float(i)} for i in range(101)], level=90)
    {'bleu_low': 5.0, 'bleu_high': 95.0}
    """
    found = {}
    for key in resampled[0] if resampled else ():
        ends = np.percentile([figures[key] for figures in resampled], [50 - level / 2, 50 + level / 2])
        found[f"{key}_low"], found[f"{key}_high"] = (round(float(end), 4) for end in ends)
    return found
