"""chrF2 of the corpus by sacreBLEU, for any language and script: a module for ``evaluate.load(path)``."""

import functools
from collections.abc import Sequence

import numpy as np
import sacrebleu

from raysft.generate.metrics.additive import AdditiveMetric


class Chrf(AdditiveMetric):
    """Statistics are the n-grams of 1 to 6 characters: of the prediction, of the reference, and those that match."""

    description = (
        "chrF2 (0 to 100) by sacreBLEU: n-grams of 1 to 6 characters without white space, recall weighted twice."
    )
    citation = """@inproceedings{popovic-2015-chrf, title = {chr{F}: character n-gram {F}-score for automatic {MT} evaluation},
author = {Popovi{\\'c}, Maja}, year = {2015}}"""
    results = "chrf."
    unit = "points"
    higher_is_better = True

    @property
    def signature(self) -> str:
        self._chrf.num_refs = 1  # pyright: ignore[reportAttributeAccessIssue]
        return str(self._chrf.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        counts = self._chrf._extract_corpus_statistics(predictions, [references]) if len(predictions) else []
        return np.array(counts, dtype=np.float64).reshape(-1, 3 * self._chrf.order)

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {"chrf": float(self._chrf._compute_score_from_stats([int(total) for total in sums]).score)}

    @functools.cached_property
    def _chrf(self) -> sacrebleu.CHRF:
        return sacrebleu.CHRF()
