"""Find the tokens of spans of characters.

A tokenizer can report the characters of each token, but then takes a third longer. The tokens of a byte-level tokenizer are
consecutive bytes of the text, so that their lengths, added up, give the same spans.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysft.data.tokenization.fast_encoder import FastEncoder
from raysft.data.tokenization.span_search import Span

Encoded = tuple[np.ndarray, list[Span]]
"""[tokens] int32 ids, and [start, end) in tokens of each span."""


class SpanEncoder:
    """Encodes texts and finds the tokens of their spans."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.encode = FastEncoder(backend)
        self.token_bytes = _token_bytes(backend)

    def __call__(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> Iterator[Encoded]:
        """Encode a batch.

        Args:
            texts: texts in which special tokens count as such. None is added.
            spans: [start, end) in characters, in order, for each text.

        Yields:
            For each text its ids and the tokens of each span: those that lie inside, and one that joins white space before the
            span (of a generation prompt that ends in a space) to its first letters.
        """
        if self.token_bytes is None:
            encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
            for text, text_spans, encoding in zip(texts, spans, encodings, strict=True):
                yield np.asarray(encoding.ids, np.int32), [token_span(encoding, span, text) for span in text_spans]
            return
        for text, text_spans, ids in zip(texts, spans, self.encode(texts), strict=True):
            ends = np.cumsum(self.token_bytes[ids])
            if len(ends) and ends[-1] == _bytes(text) and unicodedata.is_normalized("NFC", text):
                yield ids, [_token_span_by_bytes(ends, span, text) for span in text_spans]
            else:  # the tokenizer normalized the text
                encoding = self.backend.encode(text, add_special_tokens=False)
                yield ids, [token_span(encoding, span, text) for span in text_spans]


@dataclass(frozen=True)
class AddedTokens:
    """The tokens that a tokenizer adds around a text.

    A processor's ``apply_chat_template`` lets it add them to a conversation that does not begin with the token for that; a
    tokenizer's own never does.
    """

    before: np.ndarray
    after: np.ndarray
    bos: str | None
    """The token that begins a text."""

    @classmethod
    def of(cls, backend: Any, bos: str | None) -> AddedTokens:
        """Find them by encoding a text."""
        plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
        before, after = whole[:start], whole[start + len(plain) :]
        return cls(np.array(before, np.int32), np.array(after, np.int32), bos)

    def put_around(self, text: str, ids: np.ndarray, spans: list[Span]) -> Encoded:
        """Put them around the tokens of a text, and move its spans."""
        if (self.bos and text.startswith(self.bos)) or not len(self.before) + len(self.after):
            return ids, spans
        moved = [(start + len(self.before), end + len(self.before)) for start, end in spans]
        return np.concatenate([self.before, ids, self.after]), moved


def token_span(encoding: Any, span: Span, text: str) -> Span:
    """Return [start, end) of the tokens inside a span of characters, as the tokenizer reports them."""
    start, end = span
    first, stop = _token_from(encoding, start, len(text)), _token_from(encoding, end, len(text))
    if first < stop and encoding.token_to_chars(first)[0] < start and not _follows_space(text, start):
        first += 1
    return first, max(first, stop)


def _token_from(encoding: Any, start: int, end: int) -> int:
    """Return the first token that holds a character from ``start`` on."""
    for position in range(start, end):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return len(encoding)


def _follows_space(text: str, start: int) -> bool:
    """Return True if ``start`` is a first letter after white space: a token that reaches over it belongs to the span."""
    return 0 < start < len(text) and text[start - 1].isspace() and not text[start].isspace()


def _token_span_by_bytes(ends: np.ndarray, span: Span, text: str) -> Span:
    """Return the same as ``token_span``, from the bytes at which tokens end."""
    start, end = _bytes(text[: span[0]]), _bytes(text[: span[1]])
    first = int(np.searchsorted(ends, start, side="right"))
    if not _follows_space(text, span[0]) and first < len(ends) and (ends[first - 1] if first else 0) < start:
        first += 1
    return first, max(first, int(np.searchsorted(ends, end, side="right")))


def _bytes(text: str) -> int:
    """Length of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _token_bytes(backend: Any) -> np.ndarray | None:
    """[vocabulary] bytes of each token; None if tokens are not consecutive bytes of the text."""
    settings = json.loads(backend.to_str())
    steps = settings["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    other_steps = [step for step in steps if step.get("type") not in ("ByteLevel", "Digits", "Split")]
    removing_steps = [step for step in steps if step.get("behavior") == "Removed"]
    # Texts that NFC would change are found one by one.
    normalizer = (settings["normalizer"] or {"type": "NFC"})["type"]
    added = backend.get_added_tokens_decoder()
    if (
        settings["model"]["type"] != "BPE"
        or len(byte_level) != 1
        or byte_level[0].get("add_prefix_space", True)
        or other_steps
        or removing_steps
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
