"""Metrics that are computed from sums over examples, so that they can be computed in parts and resampled."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import datasets
import numpy as np

from raysft.generate.metrics.bootstrap import totals
from raysft.generate.metrics.evaluate_import import evaluate


class AdditiveMetric(evaluate.Metric, abc.ABC):
    """An ``evaluate`` module that defines the statistics of each example, and the scores that follow from their sums.

    A metric of a whole corpus, such as BLEU, is a ratio of sums, not a mean over its parts. From the sums, many tasks
    compute it exactly, for each source and for resampled examples. A file in ``generate.metrics`` may hold a class of
    this kind; its scores then have intervals too.
    """

    description: str = ""
    citation: str = ""
    results: str = ""
    """Names of the scores, for the documentation that ``evaluate`` shows."""
    unit: str | None = None
    """Unit of the scores: ``points`` (0 to 100) or ``fraction`` (0 to 1); None: unknown."""
    higher_is_better: bool | None = None
    """Direction of the scores; None: unknown."""

    @property
    def signature(self) -> str:
        """Version and settings that reproduce the scores, as the library writes them; empty if it writes none."""
        return ""

    @abc.abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """Statistics to sum: [examples, statistics] float64, with the same number of columns for zero examples."""

    @abc.abstractmethod
    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        """Scores of a corpus.

        Args:
            sums: [statistics] sums over its examples.
            examples: number of examples; may be 0.
        """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=f"""
Args:
    predictions (list of str): what the model wrote.
    references (list of str): what it should have written.
Returns:
    {self.results}
""",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        # evaluate passes columns of its own type.
        return self.scores(totals(self.statistics(list(predictions), list(references))), len(predictions))


class MeanMetric(AdditiveMetric):
    """A metric that is the mean over the scores of single examples."""

    keys: tuple[str, ...]
    """Names of the scores, in the order of the statistics' columns."""

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {key: float(total) / max(examples, 1) for key, total in zip(self.keys, sums, strict=True)}
