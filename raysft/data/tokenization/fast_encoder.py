"""Encode texts with fastokens, if it gives the same tokens as the model's tokenizer.

fastokens encodes byte-level BPE several times as fast as ``tokenizers``; ``python -m tests.benchmarks.data`` measures both. The
tokenizer stays the reference: its tokens are compared before fastokens is used, and then for one text of every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raysft.errors import RequestError

PROBES = (
    "",
    " ",
    "Hello  world,\n\n\tit's 12345.67 o'clock — I'LL say\r\n",
    "naïve façade, e\u0301 and é, ﬁn, ½, Ⅷ",
    "中文测试，日本語テスト。한국어 ไทย العربية हिन्दी",
    "😀👨‍👩‍👧 a\u200db \u00a0\u3000\ufeff\u0000\u0001",
    "def f(x):\n    return {'a': [1, 2]}  # " + "x" * 200,
)
"""Texts that both must encode alike before fastokens is used."""


class FastEncoder:
    """Encodes batches of texts to the tokens of a tokenizer."""

    def __init__(self, backend: Any) -> None:
        """Take a ``tokenizers.Tokenizer``, which is the reference."""
        self.backend = backend
        self.fast = _fast_tokenizer(backend)

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """Return [tokens] int32 ids of each text. Special tokens in a text count as such.

        Raises:
            RequestError: fastokens gives other tokens than the tokenizer.
        """
        texts = list(texts)
        if self.fast is None or not texts:
            return self._reference(texts, add_special_tokens)
        try:
            encoded = _encode(self.fast, texts, add_special_tokens)
        except ValueError:  # it refuses a byte that the vocabulary lacks, which the tokenizer skips
            return self._reference(texts, add_special_tokens)
        checked = len(texts) // 2
        if encoded[checked].tolist() != self.backend.encode(texts[checked], add_special_tokens=add_special_tokens).ids:
            raise RequestError(
                f"fastokens and tokenizers give different tokens for {texts[checked][:100]!r}; "
                "uninstall fastokens (pip uninstall fastokens), raysft works without it, only slower"
            )
        return encoded

    def _reference(self, texts: list[str], add_special_tokens: bool) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]


def _encode(fast: Any, texts: list[str], add_special_tokens: bool) -> list[np.ndarray]:
    ids, ends = fast.encode_batch_flat(texts, add_special_tokens)
    return np.split(
        np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64)
    )


def _fast_tokenizer(backend: Any) -> Any:
    """Load the tokenizer into fastokens; None if that is not installed, cannot read it or gives other tokens."""
    try:
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(backend.to_str())
    except (ImportError, ValueError):
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [
        *PROBES,
        *(token.join(PROBES[2:4]) for token in added[:1000]),
        *(f" {token} {token}x" for token in added[:1000]),
    ]
    for special in (False, True):
        for text, expected in zip(texts, backend.encode_batch_fast(texts, add_special_tokens=special), strict=True):
            try:
                (ids,) = _encode(fast, [text], special)
            except ValueError:  # a byte that the vocabulary lacks: the tokenizer encodes such batches
                continue
            if ids.tolist() != expected.ids:
                return None
    return fast
