"""sacreBLEU: statistics of single examples, the score of their sums, and the caches of its tokenizers."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu

from raysft.generate.metrics import sacrebleu_internals
from tests.contracts.contract import Contract

SACREBLEU = Contract("sacrebleu", "raysft/generate/metrics/sacrebleu_internals.py")


@pytest.mark.parametrize(("metric", "columns"), [(sacrebleu.BLEU(), 10), (sacrebleu.CHRF(), 18)])
def test_the_sums_of_statistics_give_the_score_of_the_corpus(metric, columns):
    SACREBLEU.positional(SACREBLEU.name(metric, "_extract_corpus_statistics"), 2)
    SACREBLEU.positional(SACREBLEU.name(metric, "_compute_score_from_stats"), 1)
    predictions, references = ["the cat sat on a mat", "it rains today"], ["the cat sat on the mat", "it rained today"]
    counts = sacrebleu_internals.statistics(metric, predictions, references, columns)
    assert counts.shape == (2, columns)
    whole = metric.corpus_score(predictions, [references]).score
    assert sacrebleu_internals.score(metric, counts.sum(axis=0)) == pytest.approx(whole)
    assert sacrebleu_internals.statistics(metric, [], [], columns).dtype == np.float64


@pytest.mark.parametrize("tokenizer", ["13a", "zh"])
def test_tokenizers_forget_the_texts_that_they_have_seen(tokenizer):
    metric = sacrebleu.BLEU(tokenize=tokenizer)
    SACREBLEU.name(metric.tokenizer, "_post_tokenizer")
    sacrebleu_internals.statistics(metric, ["a text"], ["a text"], 10)
    cached = type(metric.tokenizer).__call__
    assert cached.cache_info().currsize
    sacrebleu_internals.clear_caches(metric)
    assert not cached.cache_info().currsize
