"""Corpus BLEU by sacreBLEU for Chinese: each Chinese character is a word. A module for ``evaluate.load(path)``."""

from raysft.generate.metrics import bleu


class BleuZh(bleu.Bleu):
    """Like ``bleu``, with sacreBLEU's tokenizer ``zh``; other scripts are split almost as ``13a`` splits them."""

    description = (
        "Corpus BLEU (0 to 100) by sacreBLEU with its tokenizer zh, smoothed exponentially, one reference per example."
    )
    results = "bleu_zh."
    tokenizer = "zh"
    key = "bleu_zh"
