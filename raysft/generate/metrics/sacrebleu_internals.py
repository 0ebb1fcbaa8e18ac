"""The private parts of sacreBLEU that raysft uses, in one place; ``tests/contracts/test_sacrebleu.py`` checks that they exist.

Its public functions compute a corpus' score from texts alone. The bootstrap needs it from sums of each example's statistics.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def statistics(metric: Any, predictions: Sequence[str], references: Sequence[str], columns: int) -> np.ndarray:
    """Return [examples, columns] float64: the counts that a metric is made of, for each example."""
    counts = metric._extract_corpus_statistics(predictions, [references]) if len(predictions) else []
    return np.array(counts, dtype=np.float64).reshape(-1, columns)


def score(metric: Any, sums: np.ndarray) -> float:
    """Return the score of a corpus from the sums of its examples' statistics."""
    return float(metric._compute_score_from_stats([int(total) for total in sums]).score)


def clear_caches(bleu: Any) -> None:
    """Forget the texts that BLEU's tokenizers remember: 65,536 at two places, a GB in each process for long predictions."""
    for tokenizer in (bleu.tokenizer, bleu.tokenizer._post_tokenizer):
        cached: Any = type(tokenizer).__call__
        cached.cache_clear()
