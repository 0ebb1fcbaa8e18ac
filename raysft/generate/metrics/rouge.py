"""ROUGE by ``rouge_score``, the implementation of the literature in English: a module for ``evaluate.load(path)``.

Its tokenizer throws away all but a to z and 0 to 9, and Chinese text scores 0. Here letters of other scripts are kept: text in
Latin letters has the figures of ``rouge_score`` itself, and other text has figures.
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
from raysft.generate.metrics.subsequence import common_length, common_positions

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
    """Statistics are the F values of each example."""

    description = """ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (F times 100, 0 to 100) by rouge_score with Porter's stemmer, the mean
over examples; sentences of ROUGE-Lsum are lines. Chinese and Japanese characters are words, as are the words of other
scripts, which rouge_score alone throws away."""
    citation = """@inproceedings{lin-2004-rouge, title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
author = {Lin, Chin-Yew}, year = {2004}}"""
    results = "rouge1, rouge2, rougeL, rougeLsum."
    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        words = _Words()
        scorer = RougeScorer(["rouge1", "rouge2"], tokenizer=words)
        values = []
        for prediction, reference in zip(predictions, references, strict=True):
            ngrams = scorer.score(reference, prediction)
            of_both = [[words.tokenize(line) for line in text.split("\n")] for text in (prediction, reference)]
            subsequences = _rouge_l(*of_both), _rouge_lsum(*of_both)
            values.append([ngrams["rouge1"].fmeasure, ngrams["rouge2"].fmeasure, *subsequences])
        return 100 * np.array(values, dtype=np.float64).reshape(-1, len(self.keys))


def _rouge_l(prediction: list[list[str]], reference: list[list[str]]) -> float:
    """F of ROUGE-L, from the words of each line."""
    texts = [[word for line in lines for word in line] for lines in (prediction, reference)]
    return _f(common_length(*texts), *map(len, texts))


def _rouge_lsum(prediction: list[list[str]], reference: list[list[str]]) -> float:
    """F of the summary-level ROUGE-L (Lin 2004, section 3.2), from the words of each line.

    Of a line of the reference those words count that are in its longest common subsequence with any line of the prediction; as
    in ROUGE-1.5.5 no word more often than both texts have it.
    """
    left = [Counter(word for line in lines for word in line) for lines in (prediction, reference)]
    lengths = [counts.total() for counts in left]
    hits = 0
    for line in reference:
        found = set[int]().union(*(common_positions(other, line) for other in prediction))
        for word in (line[position] for position in sorted(found)):
            if all(counts[word] for counts in left):
                hits += 1
                for counts in left:
                    counts[word] -= 1
    return _f(hits, *lengths)


def _f(hits: int, predicted: int, wanted: int) -> float:
    """The harmonic mean of precision and recall."""
    if not hits:
        return 0.0
    precision, recall = hits / predicted, hits / wanted
    return 2 * precision * recall / (precision + recall)


class _Words(Tokenizer):
    """Words in small letters, those of more than three Latin letters without their endings."""

    def __init__(self) -> None:
        self._stem = functools.lru_cache(maxsize=1 << 16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text.

        >>> _Words().tokenize("Cats, running… café 模型 любви")
        ['cat', 'run', 'caf', '模', '型', 'любви']
        """
        words = _TOKEN.findall(text.lower())
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words]
