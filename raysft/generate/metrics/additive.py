"""Metrics whose figures follow from sums over examples, so that they can be computed in parts and resampled."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from raysft.generate.metrics.bootstrap import totals


class AdditiveMetric(evaluate.Metric, abc.ABC):
    """A module for ``evaluate`` that says what of each example has to be summed, and what figures the sums give.

    A metric of the whole corpus, such as BLEU, is a ratio of sums and no mean of the ratios of its parts. With the sums
    it can be computed by many tasks, for each source and for resampled examples, and is the same to the last digit.
    ``generate.metrics`` may name a file with a class of this kind; its figures then have intervals too.
    """

    description: str = ""
    citation: str = ""
    results: str = ""
    """What the figures are, for the documentation that ``evaluate`` shows."""

    @property
    def signature(self) -> str:
        """Version and settings by which others can repeat the figures, in the words of the library; empty without such."""
        return ""

    @abc.abstractmethod
    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """What is to be summed: [examples, statistics] float64, the same number of columns for no examples too."""

    @abc.abstractmethod
    def figures(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        """The figures of a corpus.

        Args:
            sums: [statistics] sums over its examples.
            examples: how many there are; none is allowed.
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
        # The loader of evaluate hands over its own kind of column.
        return self.figures(totals(self.statistics(list(predictions), list(references))), len(predictions))


class MeanMetric(AdditiveMetric):
    """A metric that is the mean of its values for each example."""

    keys: tuple[str, ...]
    """Names of the figures, in the order of the statistics' columns."""

    def figures(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {key: float(total) / max(examples, 1) for key, total in zip(self.keys, sums, strict=True)}
