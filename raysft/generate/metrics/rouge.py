"""ROUGE by ``rouge_score``, the implementation of the literature in English: a module for ``evaluate.load(path)``.

Its tokenizer throws away all but a to z and 0 to 9, and Chinese text scores 0. Here letters of other scripts are kept: text in
Latin letters has the figures of ``rouge_score`` itself, and other text has figures.
"""

from collections.abc import Sequence

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from raysft.generate.metrics.additive import MeanMetric

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
        scorer = RougeScorer(list(self.keys), tokenizer=_Words())
        scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
        values = [[100 * score[key].fmeasure for key in self.keys] for score in scores]
        return np.array(values, dtype=np.float64).reshape(-1, len(self.keys))


class _Words(Tokenizer):
    """Words in small letters, those of more than three Latin letters without their endings."""

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The words of a text.

        >>> _Words().tokenize("Cats, running… café 模型 любви")
        ['cat', 'run', 'caf', '模', '型', 'любви']
        """
        words = _TOKEN.findall(text.lower())
        return [self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]
