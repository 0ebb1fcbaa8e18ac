"""Corpus BLEU by sacreBLEU, with its default tokenizer ``13a``: a module for ``evaluate.load(path)``.

``13a`` cuts words at blanks and Latin punctuation, as the BLEU figures of the literature do. Chinese text, which has neither,
it leaves in one piece: ``bleu_zh`` is for that. For other languages without blanks ``chrf`` needs no words.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import sacrebleu

from raysft.generate.metrics.additive import AdditiveMetric


class Bleu(AdditiveMetric):
    """Statistics are the counts that BLEU is made of: lengths, then for 1 to 4 words the n-grams found and those there."""

    description = "Corpus BLEU (0 to 100) by sacreBLEU, smoothed exponentially, with case, one reference an example."
    citation = """@inproceedings{post-2018-call, title = {A Call for Clarity in Reporting {BLEU} Scores},
author = {Post, Matt}, year = {2018}}"""
    results = "bleu."
    tokenizer = "13a"
    key = "bleu"

    @property
    def signature(self) -> str:
        self._bleu.num_refs = 1  # pyright: ignore[reportAttributeAccessIssue]
        return str(self._bleu.get_signature())

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        bleu: Any = self._bleu
        counts = bleu._extract_corpus_statistics(predictions, [references]) if len(predictions) else []
        # It remembers 65,536 texts and their words, at two places, which of long predictions is a GB in each process.
        for step in (bleu.tokenizer, bleu.tokenizer._post_tokenizer):
            cached: Any = type(step).__call__
            cached.cache_clear()
        return np.array(counts, dtype=np.float64).reshape(-1, 2 + 2 * bleu.max_ngram_order)

    def figures(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        return {self.key: float(self._bleu._compute_score_from_stats([int(total) for total in sums]).score)}

    @functools.cached_property
    def _bleu(self) -> sacrebleu.BLEU:
        return sacrebleu.BLEU(tokenize=self.tokenizer, force=True)  # force: no complaint about blanks before full stops
