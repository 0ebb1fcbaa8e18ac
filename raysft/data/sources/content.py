"""A hash of what an example says, which copies of it share."""

from __future__ import annotations

import json
import re
import unicodedata
from hashlib import blake2b
from typing import Any

import numpy as np

from raysft.data.types import Example, Message
from raysft.media.files import digest

DIGEST_BYTES = 16
"""Bytes of a hash. Among a billion examples, two that differ share one with a chance of 1 in 10^21."""
MARK = "\0"
"""Begins the word that tells what follows. In the texts themselves it is doubled."""
BLANKS = bytes(32 if chr(byte).isspace() and byte < 128 else byte for byte in range(256))
"""Byte → the byte that it is compared as: a space for each blank of ASCII."""
OTHER_BLANKS = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
"""The blanks of Unicode that are not of ASCII."""
IDENTIFIERS = ("id", "tool_call_id")
"""Keys that name a call, and say nothing."""


def content_digest(example: Example) -> bytes:
    """Hash roles, contents, images, calls and functions of a conversation, or the text or the token IDs of another example.

    Texts are compared in Unicode's form NFC, with one space for all blanks between words. Weights, names of sources and places do
    not count.

    >>> content_digest(Example("a", "1", text="one\\n two")) == content_digest(Example("b", "2", text="one two "))
    True
    """
    if example.ids:
        return blake2b(np.array([example.ids, example.labels], np.int32).tobytes(), digest_size=DIGEST_BYTES).digest()
    text = " ".join(_conversation(example) if example.messages else _text(example))
    return blake2b(normalised(text), digest_size=DIGEST_BYTES).digest()


def piece_digest(digest: bytes, piece: int) -> bytes:
    """Hash a piece of an example that was split; the first has the hash of the whole."""
    if not piece:
        return digest
    return blake2b(digest + piece.to_bytes(8, "big"), digest_size=DIGEST_BYTES).digest()


def normalised(text: str) -> bytes:
    """Return a text in Unicode's form NFC, with one space for all blanks between words and none at its ends, as UTF-8.

    >>> normalised("  a\\n\\tu\\u0308 ").decode()
    'a ü'
    """
    if not text.isascii():
        text = OTHER_BLANKS.sub(" ", unicodedata.normalize("NFC", text))
    # Several times as fast as to split the text into words.
    words = text.encode("utf-8", "surrogatepass").translate(BLANKS)
    while b"  " in words:
        words = words.replace(b"  ", b" ")
    return words.strip()


def _conversation(example: Example) -> list[str]:
    """The turns of a conversation, and the functions that it may call."""
    messages = example.messages[:-1] if example.unanswered else example.messages
    parts = [_turn(message) for message in messages]
    if example.tools:
        parts.append(f"{MARK}tools {_json(example.tools)}")
    return parts


def _turn(message: Message) -> str:
    text = f"{MARK}{message.role} {_escaped(message.content)}"
    if message.media:  # the same image is the same under any name
        hashes = [medium.digest or digest(medium.content or medium.location.encode()) for medium in message.media]
        text = f"{text} {MARK}media {' '.join(hashes)}"
    if not message.tool_calls and not message.extra:
        return text
    more = {key: value for key, value in message.extra.items() if key not in IDENTIFIERS}
    return f"{text} {MARK}calls {_json([call['function'] for call in message.tool_calls])} {MARK}more {_json(more)}"


def _text(example: Example) -> list[str]:
    """A raw text, or a prompt and its completion."""
    length = example.prompt_length
    parts = [] if length is None else [f"{MARK}prompt {_escaped(example.text[:length])}"]
    return parts if example.unanswered else [*parts, f"{MARK}text {_escaped(example.text[length:])}"]


def _escaped(text: str) -> str:
    return text.replace(MARK, 2 * MARK) if MARK in text else text


def _json(value: Any) -> str:
    """A value as JSON, with spaces for line breaks and tabs in its texts."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    if "\\" in text:
        for blank in ("\\n", "\\t", "\\r"):
            text = text.replace(blank, " ")
    return text
