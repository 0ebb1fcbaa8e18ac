"""ROUGE and BLEU-4 as LLaMA-Factory defines them, so that scores are comparable: a module for ``evaluate.load(path)``.

``evaluate`` parses the imports of this file as text: one import per line, none relative.
"""

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from operator import add

import numpy as np
from nltk.translate.bleu_score import brevity_penalty
from rouge_chinese import Rouge

from raysft.generate.metrics.additive import MeanMetric
from raysft.subsequence import common_length

with warnings.catch_warnings():  # jieba imports pkg_resources, which warns that it is deprecated
    warnings.simplefilter("ignore")
    import jieba


_LONGEST_REMEMBERED = 32
"""Characters of a piece whose words are remembered: a word of a script with spaces is shorter."""


class Similarity(MeanMetric):
    """Statistics are the four scores of each example."""

    description = """Similarity of predictions to references: ROUGE-1, ROUGE-2 and ROUGE-L (F) over the words that jieba
finds, and BLEU-4 over characters with the smoothing method3 of NLTK; all times 100, the mean over examples."""
    citation = """@inproceedings{lin-2004-rouge, title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
author = {Lin, Chin-Yew}, year = {2004}}
@inproceedings{papineni-2002-bleu, title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing}, year = {2002}}"""
    results = "rouge-1, rouge-2, rouge-l, bleu-4."
    keys = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
    unit = "points"
    higher_is_better = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        jieba.setLogLevel("WARNING")
        examples = [_similarity(*pair) for pair in zip(predictions, references, strict=True)]
        values = [[example[key] for key in self.keys] for example in examples]
        return np.array(values, dtype=np.float64).reshape(-1, len(self.keys))

    def scores(self, sums: np.ndarray, examples: int) -> dict[str, float]:
        # LLaMA-Factory rounds the scores of each example, and then their mean.
        return {key: round(mean, 4) for key, mean in super().scores(sums, examples).items()}


def _similarity(prediction: str, reference: str) -> dict[str, float]:
    """The four scores of one example, each times 100 and rounded to 4 places."""
    hypothesis, target = (" ".join(_words(text)) for text in (prediction, reference))
    scores = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    if hypothesis.split() and target.split():
        scores.update(_rouge(hypothesis, target))
    scores["bleu-4"] = _bleu_4(prediction, reference)
    return {key: round(value * 100, 4) for key, value in scores.items()}


def _rouge(hypothesis: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L of ``rouge_chinese`` to the last digit.

    Its own table for ROUGE-L takes a second for two texts of 1,000 words, and four times the time and memory for each doubling.
    """
    one, other = (
        [word for part in Rouge().cut_sent(text) if len(part) > 0 for word in " ".join(part.split()).split(" ")]
        for text in (hypothesis, reference)
    )
    pairs = set(pairwise(one)), set(pairwise(other))
    return {
        "rouge-1": _f(len(set(one) & set(other)), len(set(one)), len(set(other))),
        "rouge-2": _f(len(pairs[0] & pairs[1]), len(pairs[0]), len(pairs[1])),
        "rouge-l": _f(common_length(one, other), len(one), len(other)),
    }


def _f(common: int, found: int, wanted: int) -> float:
    """The F-measure as ``rouge_chinese`` rounds it."""
    precision, recall = common / max(1, found), common / max(1, wanted)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _words(text: str) -> list[str]:
    """The words of jieba, which never go over white space: those of a piece that occurs often are found once."""
    pieces = re.split(r"(\s+)", text)
    return [
        word
        for piece in pieces
        for word in (_remembered_words(piece) if len(piece) <= _LONGEST_REMEMBERED else jieba.cut(piece))
    ]


@functools.lru_cache(maxsize=1 << 16)
def _remembered_words(piece: str) -> tuple[str, ...]:
    return tuple(jieba.cut(piece))


def _bleu_4(prediction: str, reference: str) -> float:
    """BLEU-4 of ``nltk`` to the last digit, over characters with its smoothing method3.

    N-grams are texts: NLTK's tuples of characters take ten times as long.
    """
    logs, missed = [], 0
    ngrams = list(prediction), list(reference)
    for order in range(1, 5):
        if order > 1:
            ngrams = (
                list(map(add, ngrams[0], prediction[order - 1 :])),
                list(map(add, ngrams[1], reference[order - 1 :])),
            )
        found, wanted = map(Counter, ngrams)
        matches = sum(min(found[ngram], wanted[ngram]) for ngram in found.keys() & wanted.keys())
        if not matches and order == 1:
            return 0.0
        missed += not matches
        total = max(1, found.total())
        logs.append(0.25 * math.log(matches / total if matches else 1 / (2**missed * total)))
    return brevity_penalty(len(reference), len(prediction)) * math.exp(math.fsum(logs))
