"""Share of the predictions that are just their reference: a module for ``evaluate.load(path)``."""

from collections.abc import Sequence

import numpy as np

from raysft.generate.metrics.additive import MeanMetric


class ExactMatch(MeanMetric):
    """The mean of 1 for a prediction that equals its reference and 0 for another."""

    description = """Share (0 to 1) of the predictions that equal their reference in every character, case and punctuation
included, once blanks at both ends are gone; otherwise as the module of that name on the Hugging Face Hub."""
    results = "exact_match."
    keys = ("exact_match",)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        # A model writes blanks where its chat template has some, which nobody means by another answer.
        equal = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return np.array(equal, dtype=np.float64).reshape(-1, 1)
