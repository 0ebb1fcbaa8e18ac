"""Corpus BLEU by sacreBLEU for Chinese: each Chinese character is a word. A module for ``evaluate.load(path)``."""

from raysft.generate.metrics import bleu


class BleuZh(bleu.Bleu):
    """As ``bleu``, with sacreBLEU's tokenizer ``zh``; what is not Chinese is cut nearly as ``13a`` does."""

    description = (
        "Corpus BLEU (0 to 100) by sacreBLEU with its tokenizer zh, smoothed exponentially, one reference an example."
    )
    results = "bleu_zh."
    tokenizer = "zh"
    key = "bleu_zh"
