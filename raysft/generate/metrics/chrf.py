"""chrF2 of the corpus by sacreBLEU, for any language and script: a module for ``evaluate.load(path)``."""

import functools
from collections.abc import Sequence

import numpy as np
import sacrebleu

from raysft.generate.metrics import sacrebleu_internals
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
        return sacrebleu_internals.statistics(self._chrf, predictions, references, columns=3 * self._chrf.order)

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {"chrf": sacrebleu_internals.score(self._chrf, sums)}

    @functools.cached_property
    def _chrf(self) -> sacrebleu.CHRF:
        return sacrebleu.CHRF()
