"""Corpus BLEU by sacreBLEU, with its default tokenizer ``13a``: a module for ``evaluate.load(path)``.

``13a`` splits words at white space and Latin punctuation, as published BLEU scores do. Chinese text has neither and stays in one
piece: use ``bleu_zh``. For other languages without spaces use ``chrf``, which needs no words.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import sacrebleu

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
        bleu: Any = self._bleu
        counts = bleu._extract_corpus_statistics(predictions, [references]) if len(predictions) else []
        # sacreBLEU caches 65,536 texts and their words in two places: a GB in each process if predictions are long.
        for tokenizer in (bleu.tokenizer, bleu.tokenizer._post_tokenizer):
            cached: Any = type(tokenizer).__call__
            cached.cache_clear()
        return np.array(counts, dtype=np.float64).reshape(-1, 2 + 2 * bleu.max_ngram_order)

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {self.key: float(self._bleu._compute_score_from_stats([int(total) for total in sums]).score)}

    @functools.cached_property
    def _bleu(self) -> sacrebleu.BLEU:
        return sacrebleu.BLEU(tokenize=self.tokenizer, force=True)  # force: no warning about tokenized text
