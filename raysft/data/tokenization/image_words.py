"""What a chat template writes for an image. Pure.

In rendered conversations one character, ``MEDIUM``, stands for it, as it does in the contents of messages, so that assistant turns
are found among images as among letters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix
from typing import Any

from raysft.data.tokenization.escapes import ESCAPE_START
from raysft.data.tokenization.markers import Render, Tool, Turn
from raysft.data.tokenization.span_search import Span
from raysft.data.types import MEDIUM

TAGS = r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])*"
BEFORE, AFTER = "\uf2b6", "\uf2b7"
"""Private letters, which no template contains."""


class ImageWords:
    """Gives one template its images, and finds them in what it renders."""

    def __init__(self, render: Render, token: str, usual: str = "") -> None:
        """Take a template and its processor's words.

        Args:
            render: the template.
            token: the processor replaces it by the text of an image.
            usual: what the model's own template writes for an image, for one that knows of no images. Default: the token.
        """
        self.template, self.token, self.usual = render, token, usual or token

    def render(self, turns: Sequence[Turn], tools: Sequence[Tool], add_generation_prompt: bool) -> str:
        """Render a conversation; ``MEDIUM`` stands for its images."""
        return self.marked(self.template(self.given(turns), tools, add_generation_prompt))

    def given(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return turns with their images as the template reads them: as parts of the content, or as words in a text."""
        return [{**turn, "content": self._content(turn["content"])} if _has_images(turn) else turn for turn in turns]

    def marked(self, text: str) -> str:
        """Put ``MEDIUM`` in place of what the template has written for each image."""
        return self._pattern.sub(MEDIUM, text) if self.token in text else text

    def marked_spans(self, text: str, spans: Sequence[Span]) -> tuple[str, tuple[Span, ...]]:
        """Do the same for a text with spans."""
        if self.token not in text:
            return text, tuple(spans)
        ends = [match.end() for match in self._pattern.finditer(text)]
        lost = len(self.words) - len(MEDIUM)

        def moved(position: int) -> int:
            return position - lost * sum(end <= position for end in ends)

        return self.marked(text), tuple((moved(start), moved(end)) for start, end in spans)

    @property
    def words(self) -> str:
        """What the template writes for an image: the token, with the tags around it."""
        return self._found[1]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"(?<!{ESCAPE_START}){re.escape(self.words)}")

    @cached_property
    def _found(self) -> tuple[bool, str]:
        """Whether the template reads images as parts of a content, and what it writes for one.

        A template that does not, writes the parts out, or refuses them.
        """
        before, after = ({"type": "text", "text": text} for text in (BEFORE, AFTER))
        answer: Turn = {"role": "assistant", "content": [{"type": "text", "text": "-"}]}
        for following in ([], [answer]):  # some refuse conversations that end with a question
            try:
                without, text = (
                    self.template([{"role": "user", "content": content}, *following], (), False)
                    for content in ([before, after], [before, {"type": "image"}, after])
                )
            except Exception:  # a template may raise any error
                continue
            start = len(commonprefix([without, text]))  # noqa: RUF071 (it compares characters on purpose)
            end = len(text) - len(commonprefix([without[start:][::-1], text[start:][::-1]]))  # noqa: RUF071
            found = re.search(TAGS + re.escape(self.token) + TAGS, text[start:end])
            if found and text.count(self.token) == 1 and BEFORE in text and AFTER in text and "'type'" not in text:
                return True, found[0]
        return False, self.usual

    def _content(self, content: Any) -> Any:
        if not self._found[0]:
            if isinstance(content, str):
                return content.replace(MEDIUM, self.words)
            return [
                {**part, "text": part["text"].replace(MEDIUM, self.words)} if _is_text(part) else part
                for part in content
            ]
        if isinstance(content, str):
            return _parts(content)
        return [new for part in content for new in (_parts(part["text"]) if _is_text(part) else [part])]


def _has_images(turn: Turn) -> bool:
    content = turn.get("content")
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or () if _is_text(part)]
    return any(MEDIUM in text for text in texts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _parts(text: str) -> list[dict[str, Any]]:
    """Split a text into parts at its images.

    >>> _parts(f"one{MEDIUM}{MEDIUM}two") == [
    ...     {"type": "text", "text": "one"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "two"}
    ... ]
    True
    """
    pieces = re.split(f"({MEDIUM})", text)
    return [{"type": "image"} if piece == MEDIUM else {"type": "text", "text": piece} for piece in pieces if piece]
