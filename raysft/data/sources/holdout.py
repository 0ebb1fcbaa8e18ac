"""Which examples are kept out of training: a stable hash of how they open decides."""

from __future__ import annotations

import hashlib
import re

from raysft.data.types import Example


def opening(example: Example) -> str:
    """The words that decide on which side of the hold-out an example falls: its first user turn, its prompt, its whole text,
    or the first of its token ids.

    Case, punctuation and spaces do not count, so that near copies stay together.
    """
    text = next((message.content for message in example.messages if message.role == "user"), "")
    text = text or example.text[: example.prompt_length] or example.text or " ".join(map(str, example.ids[:64]))
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def is_held_out(example: Example, share: float) -> bool:
    """Whether a stable hash of the opening puts an example into the held-out share."""
    digest = hashlib.sha256(opening(example).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
