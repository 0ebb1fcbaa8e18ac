"""Fraction of the predictions that equal their reference: a module for ``evaluate.load(path)``."""

from collections.abc import Sequence

import numpy as np

from raysft.generate.metrics.additive import MeanMetric


class ExactMatch(MeanMetric):
    """The statistic of an example is 1 if the prediction equals its reference, else 0."""

    description = """Fraction (0 to 1) of the predictions that equal their reference in every character, including case and
punctuation, after stripping white space at both ends; otherwise like the module of that name on the Hugging Face Hub."""
    results = "exact_match."
    keys = ("exact_match",)
    unit = "fraction"
    higher_is_better = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        # Models write white space where their chat template has some; that does not make an answer wrong.
        equal = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return np.array(equal, dtype=np.float64).reshape(-1, 1)
