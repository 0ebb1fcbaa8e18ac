"""ROUGE and BLEU-4 as LLaMA-Factory defines them, so that scores are comparable: a module for ``evaluate.load(path)``.

``evaluate`` parses the imports of this file as text: one import per line, none relative.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from raysft.generate.metrics.additive import MeanMetric
from raysft.subsequence import common_length

with warnings.catch_warnings():  # jieba imports pkg_resources, which warns that it is deprecated
    warnings.simplefilter("ignore")
    import jieba


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
    hypothesis, target = (" ".join(jieba.cut(text)) for text in (prediction, reference))
    scores = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    if hypothesis.split() and target.split():
        ngrams: Any = Rouge(metrics=["rouge-1", "rouge-2"]).get_scores(hypothesis, target)[0]
        scores.update({key: value["f"] for key, value in ngrams.items()})
        scores["rouge-l"] = _rouge_l(hypothesis, target)
    smoothing = SmoothingFunction().method3
    bleu: Any = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    scores["bleu-4"] = bleu
    return {key: round(value * 100, 4) for key, value in scores.items()}


def _rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L of ``rouge_chinese`` to the last digit, without its quadratic table.

    That table takes a second for two texts of 1,000 words, and four times the time and memory for each doubling.
    """
    words = []
    for text in (hypothesis, reference):
        sentences = [" ".join(part.split()) for part in Rouge().cut_sent(text) if len(part) > 0]
        words.append([word for sentence in sentences for word in sentence.split(" ")])
    common = common_length(*words)
    precision, recall = common / len(words[0]), common / len(words[1])
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
