"""Control tokens that a record's own texts contain, such as a literal ``<|im_end|>``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from raysft.data.sources.tool_calls import nested_strings
from raysft.data.tokenization.escapes import ESCAPE_END, ESCAPE_START, unescape
from raysft.data.tokenization.span_search import Span
from raysft.data.tokenization.tokenizer import Tokenizer, load_backend
from raysft.data.types import Example, Message


class ControlTokens:
    """Finds and escapes control tokens in examples, and encodes escaped texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pattern = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")
        self.backend = load_backend(tokenizer.identity, tokenizer.backend)
        self.plain_backend = load_backend(tokenizer.identity, tokenizer.backend, plain=True)

    def found_in(self, example: Example) -> bool:
        """Return True if a text of the example contains a control token."""
        return any(self.pattern.search(text) for text in texts_of(example))

    def can_escape(self, token: str) -> bool:
        """Return True if a control token can be encoded as plain text."""
        return len(self.plain_backend.encode(token, add_special_tokens=False).ids) > 1

    def escape(self, value: Any) -> Any:
        """Escape each control token in the texts of a value."""
        if isinstance(value, str):
            return self.pattern.sub(f"{ESCAPE_START}\\g<0>{ESCAPE_END}", unescape(value))
        if isinstance(value, dict):
            return {self.escape(key): self.escape(inner) for key, inner in value.items()}
        return type(value)(map(self.escape, value)) if isinstance(value, list | tuple) else value

    def escape_message(self, message: Message) -> Message:
        """Escape each control token in what somebody wrote in a message."""
        return replace(
            message,
            content=self.escape(message.content),
            tool_calls=self.escape(message.tool_calls),
            extra=self.escape(message.extra),
            original=self.escape(message.original),
        )

    def encode(self, text: str) -> tuple[np.ndarray, list[Span]]:
        """Encode a text with escaped control tokens.

        Returns:
            [tokens] int32 ids, and [start, end) of each token in characters of ``text``.
        """
        ids: list[int] = []
        offsets: list[Span] = []
        position = 0
        for index, part in enumerate(re.split(f"[{ESCAPE_START}{ESCAPE_END}]", text)):
            encoding = (self.plain_backend if index % 2 else self.backend).encode(part, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(position + start, position + end) for start, end in encoding.offsets]
            position += len(part) + 1
        return np.asarray(ids, np.int32), offsets


def texts_of(example: Example) -> Iterator[str]:
    """Yield everything that somebody wrote in an example."""
    yield example.text
    for message in example.messages:
        yield message.content
        if message.tool_calls or message.extra or message.original:
            yield from nested_strings((message.tool_calls, message.extra, message.original))
    if example.tools:
        yield from nested_strings(example.tools)
