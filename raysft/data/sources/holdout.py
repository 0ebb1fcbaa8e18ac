"""Decide by a stable hash of their opening which examples are held out of training."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np

from raysft.data.types import Example
from raysft.errors import RequestError
from raysft.media.files import digest


def opening(example: Example) -> str:
    """Text that decides the split of an example: its first user turn, its prompt, its whole text, or its first token IDs.

    Case, punctuation and spaces are ignored, so that near duplicates get the same split. Images of the turn, or before it, count
    as the record names them, or by their bytes if it holds them: no file is read.
    """
    asked = next((index for index, message in enumerate(example.messages) if message.role == "user"), None)
    text = "" if asked is None else example.messages[asked].content
    text = text or example.text[: example.prompt_length] or example.text or " ".join(map(str, example.ids[:64]))
    words = " ".join(re.findall(r"\w+", text.casefold())) or text
    media = [] if asked is None else [medium for message in example.messages[: asked + 1] for medium in message.media]
    return "\0".join([words, *(medium.location or digest(medium.content) for medium in media)])


def opening_hash(example: Example) -> int:
    """Return a stable hash of an example's opening, below 2^64."""
    digest = hashlib.sha256(opening(example).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(example: Example, limit: int) -> bool:
    """True if the hash of an example's opening is below a limit."""
    return opening_hash(example) < limit


def limit_of_fraction(fraction: float) -> int:
    """Return the limit below which a fraction of all hashes lies."""
    return math.ceil(fraction * 2**64)


def limit_of_count(count: int, hashes: np.ndarray) -> int:
    """Return the limit below which the hashes of this many examples lie, or of a few more, whose opening the last one shares.

    Args:
        count: number of examples to hold out.
        hashes: [examples] uint64 hashes of all openings, in any order.

    Raises:
        RequestError: no example would be left to train on.
    """
    if count >= len(hashes):
        raise RequestError(
            f"data.holdout={count} must be less than the number of examples in data.train, but there are {len(hashes):,}; "
            "lower it, or add data"
        )
    limit = int(np.partition(hashes, count - 1)[count - 1]) + 1
    held_out = len(hashes) if limit == 2**64 else int((hashes < np.uint64(limit)).sum())
    if held_out == len(hashes):
        raise RequestError(
            f"data.holdout={count} holds out examples with the same opening together, but that leaves none of the "
            f"{len(hashes):,} examples in data.train; lower it, or give files in data.eval"
        )
    return limit
