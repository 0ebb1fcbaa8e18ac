"""Tags and words of a text, which no bound cuts in two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix

WHOLE = re.compile(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?|\w+")
"""A tag or a word."""
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""How templates write tokens of their own."""


def last_piece(text: str) -> str:
    """The tag or the word that a text ends with, and the signs behind it."""
    end = text[-100:]
    return end[max((match.start() for match in WHOLE.finditer(end)), default=0) :]


def common(one: str, other: str) -> int:
    """How far two texts are the same, without half a tag or half a word."""
    size = len(commonprefix([one, other]))  # noqa: RUF071 (characters are what it is about)
    for text in (one, other):
        for match in WHOLE.finditer(text[: size + 100]):
            if match.start() < size < match.end():
                size = match.start()
    return size


def before_common_end(text: str, other: str) -> str:
    """What precedes the end that two texts have in common, which begins with a whole tag or word.

    >>> before_common_end("<|end|><|user|>", "<s><|user|>")
    '<|end|>'
    """
    cut = len(text) - len(commonprefix([text[::-1], other[::-1]]))  # noqa: RUF071 (characters are what it is about)
    return text[: next((match.end() for match in WHOLE.finditer(text) if match.start() < cut < match.end()), cut)]


def stand_in(text: str, contents: Sequence[str]) -> bool:
    """Whether the contents stand in the text, in order."""
    at = 0
    for content in contents:
        at = text.find(content, at)
        if at < 0:
            return False
        at += len(content)
    return True
