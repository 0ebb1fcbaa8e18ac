"""Decide by a stable hash of their opening which examples are held out of training."""

from __future__ import annotations

import hashlib
import re

from raysft.data.types import Example


def opening(example: Example) -> str:
    """Text that decides the split of an example: its first user turn, its prompt, its whole text, or its first token IDs.

    Case, punctuation and spaces are ignored, so that near duplicates get the same split.
    """
    text = next((message.content for message in example.messages if message.role == "user"), "")
    text = text or example.text[: example.prompt_length] or example.text or " ".join(map(str, example.ids[:64]))
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def is_held_out(example: Example, fraction: float) -> bool:
    """True if the hash of an example's opening falls into the held-out fraction."""
    digest = hashlib.sha256(opening(example).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
