"""Compare rendered texts without cutting a tag or a word in two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix

TAG_OR_WORD = re.compile(r"<[^<>\s]*>?|\[[^\[\]\s]*\]?|\w+")
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""How templates write their own tokens."""


def last_tag_or_word(text: str) -> str:
    """Return the last tag or word of a text, with the characters after it."""
    end = text[-100:]
    return end[max((match.start() for match in TAG_OR_WORD.finditer(end)), default=0) :]


def common_length(one: str, other: str) -> int:
    """Length of the beginning that two texts share, without half a tag or half a word.

    >>> common_length("Hello <s>", "Hello <a>")
    6
    """
    size = len(commonprefix([one, other]))  # noqa: RUF071 (it compares characters on purpose)
    for text in (one, other):
        for match in TAG_OR_WORD.finditer(text[: size + 100]):
            if match.start() < size < match.end():
                size = match.start()
    return size


def before_common_end(text: str, other: str) -> str:
    """Return ``text`` without the end that both texts share, which begins with a whole tag or word.

    >>> before_common_end("<|end|><|user|>", "<s><|user|>")
    '<|end|>'
    """
    cut = len(text) - len(commonprefix([text[::-1], other[::-1]]))  # noqa: RUF071 (it compares characters on purpose)
    return text[: next((match.end() for match in TAG_OR_WORD.finditer(text) if match.start() < cut < match.end()), cut)]


def contains_in_order(text: str, contents: Sequence[str]) -> bool:
    """Return True if the text contains all contents, one after another."""
    position = 0
    for content in contents:
        position = text.find(content, position)
        if position < 0:
            return False
        position += len(content)
    return True
