"""ROUGE by ``rouge_score``, the usual implementation for English: a module for ``evaluate.load(path)``.

The tokenizer of ``rouge_score`` discards everything but a to z and 0 to 9, so that Chinese text scores 0. This module keeps
letters of other scripts; text in Latin letters has exactly the scores of ``rouge_score``.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from raysft.generate.metrics.additive import MeanMetric
from raysft.subsequence import common_length, common_pairs

_TOKEN = regex.compile(
    r"""(?V1)
    [a-z0-9]+
    | [\p{Han}\p{Hiragana}\p{Katakana}]
    | [[\p{L}\p{Nd}]--[\p{Latin}\p{Common}\p{Han}\p{Hiragana}\p{Katakana}]]
      [[\p{L}\p{M}\p{Nd}]--[\p{Latin}\p{Common}\p{Han}\p{Hiragana}\p{Katakana}]]*
    """,
    regex.VERBOSE,
)


class Rouge(MeanMetric):
    """Statistics are the four F-measures of each example."""

    description = """ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (F times 100, 0 to 100) by rouge_score with Porter's stemmer, the mean
over examples; the sentences of ROUGE-Lsum are lines. Chinese and Japanese characters count as words, and words of other
scripts are kept, which rouge_score itself discards."""
    citation = """@inproceedings{lin-2004-rouge, title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
author = {Lin, Chin-Yew}, year = {2004}}"""
    results = "rouge1, rouge2, rougeL, rougeLsum."
    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    unit = "points"
    higher_is_better = True

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        words = _Words()
        scorer = RougeScorer(["rouge1", "rouge2"], tokenizer=words)
        values = []
        for prediction, reference in zip(predictions, references, strict=True):
            ngrams = scorer.score(reference, prediction)
            lines = [[words.tokenize(line) for line in text.split("\n")] for text in (prediction, reference)]
            subsequences = _rouge_l(*lines), _rouge_lsum(*lines)
            values.append([ngrams["rouge1"].fmeasure, ngrams["rouge2"].fmeasure, *subsequences])
        return 100 * np.array(values, dtype=np.float64).reshape(-1, len(self.keys))


def _rouge_l(prediction: list[list[str]], reference: list[list[str]]) -> float:
    """F-measure of ROUGE-L, from the words of each line."""
    texts = [[word for line in lines for word in line] for lines in (prediction, reference)]
    return _f(common_length(*texts), *map(len, texts))


def _rouge_lsum(prediction: list[list[str]], reference: list[list[str]]) -> float:
    """F-measure of the summary-level ROUGE-L (Lin 2004, section 3.2), from the words of each line.

    A word in a line of the reference is a hit if it is in the longest common subsequence with any line of the prediction.
    As in ROUGE-1.5.5, no word is a hit more often than it occurs in both texts.
    """
    remaining = [Counter(word for line in lines for word in line) for lines in (prediction, reference)]
    lengths = [counts.total() for counts in remaining]
    hits = 0
    for line in reference:
        positions = {position for other in prediction for _, position in common_pairs(other, line)}
        for word in (line[position] for position in sorted(positions)):
            if all(counts[word] for counts in remaining):
                hits += 1
                for counts in remaining:
                    counts[word] -= 1
    return _f(hits, *lengths)


def _f(hits: int, predicted: int, expected: int) -> float:
    """The harmonic mean of precision and recall."""
    if not hits:
        return 0.0
    precision, recall = hits / predicted, hits / expected
    return 2 * precision * recall / (precision + recall)


class _Words(Tokenizer):
    """Splits text into lower-case words, and stems those of more than three Latin letters."""

    def __init__(self) -> None:
        self._stem = functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text.

        >>> _Words().tokenize("Cats, running… café 模型 любви")
        ['cat', 'run', 'caf', '模', '型', 'любви']
        """
        words = _TOKEN.findall(text.lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]
