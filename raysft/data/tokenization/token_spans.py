"""Which tokens lie in a span of characters.

The tokenizer can say it, and takes a third longer when it keeps count. Tokens of a byte-level tokenizer are the bytes of the text
cut in pieces, so that adding up their lengths says the same.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from raysft.data.tokenization.assistant_spans import Span
from raysft.data.tokenization.fast_encoder import QuickEncoder

Encoded = tuple[np.ndarray, list[Span]]
"""[tokens] int32 ids, and [start, end) of the tokens inside each span."""


class SpanEncoder:
    """Encodes texts, and finds the tokens of their spans."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.encode = QuickEncoder(backend)
        self.token_bytes = _token_bytes(backend)

    def __call__(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> Iterator[Encoded]:
        """Encode a batch.

        Args:
            texts: as they are; special tokens in them count as such and none is added.
            spans: [start, end) in characters, in order, for each text.

        Yields:
            For each text its ids and, for each of its spans, the tokens that lie in it: as a whole, or those that join white
            space before it (a generation prompt that ends in a space) to the first letters of what was written.
        """
        if self.token_bytes is None:
            for text, wanted, encoding in zip(
                texts, spans, self.backend.encode_batch(list(texts), add_special_tokens=False), strict=True
            ):
                yield np.asarray(encoding.ids, np.int32), [token_span(encoding, span, text) for span in wanted]
            return
        for text, wanted, ids in zip(texts, spans, self.encode(texts), strict=True):
            ends = np.cumsum(self.token_bytes[ids])
            if len(ends) and ends[-1] == _bytes(text) and unicodedata.is_normalized("NFC", text):
                yield (
                    ids,
                    [
                        _from_ends(ends, _bytes(text[: span[0]]), _bytes(text[: span[1]]), _joins(text, span[0]))
                        for span in wanted
                    ],
                )
            else:  # the tokenizer changed the text before it cut it
                kept = self.backend.encode(text, add_special_tokens=False)
                yield ids, [token_span(kept, span, text) for span in wanted]


def token_span(encoding: Any, span: Span, text: str) -> Span:
    """[start, end) of the tokens of an encoded text that lie inside a span of its characters, as the tokenizer counts them."""
    start, end = span
    first, stop = _token_from(encoding, start, len(text)), _token_from(encoding, end, len(text))
    if first < stop and encoding.token_to_chars(first)[0] < start and not _joins(text, start):
        first += 1
    return first, max(first, stop)


def _token_from(encoding: Any, at: int, characters: int) -> int:
    """The token that holds a character or, where none does, the next one that does."""
    for place in range(at, characters):
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return len(encoding)


def _joins(text: str, start: int) -> bool:
    """Whether a token that begins before ``start`` and reaches over it belongs to what begins there: it joins a space to it."""
    return 0 < start < len(text) and text[start - 1].isspace() and not text[start].isspace()


def _from_ends(ends: np.ndarray, start: int, end: int, joins: bool) -> Span:
    """The same from the bytes at which tokens end: those that begin at ``start`` or later and end at ``end`` or before."""
    first = int(np.searchsorted(ends, start, side="right"))
    if not joins and first < len(ends) and (ends[first - 1] if first else 0) < start:
        first += 1
    return first, max(first, int(np.searchsorted(ends, end, side="right")))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _token_bytes(backend: Any) -> np.ndarray | None:
    """[vocabulary] bytes of each token; None where tokens are not the bytes of the text in pieces."""
    whole = json.loads(backend.to_str())
    steps = whole["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    changes = [step for step in steps if step.get("type") not in ("ByteLevel", "Digits", "Split")]
    removes = [step for step in steps if step.get("behavior") == "Removed"]
    normalizer = (whole["normalizer"] or {"type": "NFC"})[
        "type"
    ]  # texts that NFC would change are told apart one by one
    added = backend.get_added_tokens_decoder()
    if (
        whole["model"]["type"] != "BPE"
        or len(levels) != 1
        or levels[0].get("add_prefix_space", True)
        or changes
        or removes
        or normalizer != "NFC"
        or any(token.lstrip or token.rstrip for token in added.values())
    ):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        # Each character of an ordinary token stands for one byte.
        sizes[index] = len(token.encode()) if index in added else len(token)
    return sizes
