"""Word-level comparison of a prediction with its reference: a cheap score, and marks on the words that differ."""

from __future__ import annotations

import re
from collections import Counter

from markupsafe import Markup, escape

from raysft.report.text import visible, without_middle
from raysft.subsequence import common_pairs

MAX_WORDS = 400
"""Number of words at the beginning of a text that are compared."""
MIN_OVERLAP = 0.4
"""Fraction of the words that two texts must share to be marked. Below, almost every word would be."""

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
"""A word, a punctuation mark, or a character of a script without spaces."""


def words(text: str) -> list[str]:
    """Lower-case words of a text.

    >>> words("It's 北京!")
    ['it', "'", 's', '北', '京', '!']
    """
    return _WORD.findall(text.lower())


def word_f1(prediction: str, reference: str) -> float:
    """Twice the number of words that two texts share, divided by the number of words of both; order does not count.

    It is cheap and symmetric: 1 if all words are shared, 0 if none is.

    >>> word_f1("The sea is blue.", "the sea was blue."), word_f1("北京", "北京市"), word_f1("", "a")
    (0.8, 0.8, 0.0)
    """
    predicted, expected = Counter(words(prediction)), Counter(words(reference))
    total = predicted.total() + expected.total()
    return 2 * (predicted & expected).total() / total if total else 1.0


def marked(reference: str, prediction: str) -> tuple[Markup, Markup]:
    """Both texts, escaped, with marks on the words that the other text does not have in the same place.

    >>> marked("a red <b>", "a blue <b>")[1]
    Markup('a <mark>blue</mark> &lt;b&gt;')
    """
    texts = [visible(without_middle(text)) for text in (reference, prediction)]
    tokens = [_tokens(text) for text in texts]
    left, right = ([word.lower() for word, _ in side[:MAX_WORDS]] for side in tokens)
    pairs = common_pairs(left, right)
    if 2 * len(pairs) < MIN_OVERLAP * (len(left) + len(right)):
        return escape(texts[0]), escape(texts[1])
    only_left = set(range(len(left))) - {i for i, _ in pairs}
    only_right = set(range(len(right))) - {j for _, j in pairs}
    return _mark(tokens[0], only_left), _mark(tokens[1], only_right)


def _tokens(text: str) -> list[tuple[str, str]]:
    """A text as pairs of a word and the space after it. Joined, they give the text.

    >>> _tokens(" a b")
    [('', ' '), ('a', ' '), ('b', '')]
    """
    spans = [(0, 0), *(match.span() for match in _WORD.finditer(text))]
    next_starts = [start for start, _ in spans[1:]] + [len(text)]
    tokens = [(text[start:end], text[end:after]) for (start, end), after in zip(spans, next_starts, strict=True)]
    return tokens if tokens[0] != ("", "") else tokens[1:]


def _mark(tokens: list[tuple[str, str]], differing: set[int]) -> Markup:
    """Mark the words at some indices; neighbouring words share one mark."""
    parts: list[Markup] = []
    for index, (word, space) in enumerate(tokens):
        inside = index in differing and word
        if inside and index - 1 not in differing:
            parts.append(Markup("<mark>"))
        parts.append(escape(word))
        if inside and index + 1 not in differing:
            parts.append(Markup("</mark>"))
        parts.append(escape(space))
    return Markup("").join(parts)
