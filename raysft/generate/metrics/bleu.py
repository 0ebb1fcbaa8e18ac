"""Corpus BLEU by sacreBLEU, with its default tokenizer ``13a``: a module for ``evaluate.load(path)``.

``13a`` splits words at white space and Latin punctuation, as published BLEU scores do. Chinese text has neither and stays in one
piece: use ``bleu_zh``. For other languages without spaces use ``chrf``, which needs no words.
"""

import functools
from collections.abc import Sequence

import numpy as np
import sacrebleu

from raysft.generate.metrics import sacrebleu_internals
from raysft.generate.metrics.additive import AdditiveMetric


class Bleu(AdditiveMetric):
    """Statistics are sacreBLEU's counts: both lengths, then the matching and the total n-grams of 1 to 4 words."""

    description = (
        "Corpus BLEU (0 to 100) by sacreBLEU, smoothed exponentially, case-sensitive, one reference per example."
    )
    citation = """@inproceedings{post-2018-call, title = {A Call for Clarity in Reporting {BLEU} Scores},
author = {Post, Matt}, year = {2018}}"""
    results = "bleu."
    tokenizer = "13a"
    key = "bleu"
    unit = "points"
    higher_is_better = True

    @property
    def signature(self) -> str:
        self._bleu.num_refs = 1  # pyright: ignore[reportAttributeAccessIssue]
        return str(self._bleu.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        counts = sacrebleu_internals.statistics(
            self._bleu, predictions, references, columns=2 + 2 * self._bleu.max_ngram_order
        )
        sacrebleu_internals.clear_caches(self._bleu)
        return counts

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {self.key: sacrebleu_internals.score(self._bleu, sums)}

    @functools.cached_property
    def _bleu(self) -> sacrebleu.BLEU:
        return sacrebleu.BLEU(tokenize=self.tokenizer, force=True)  # force: no warning about tokenized text
