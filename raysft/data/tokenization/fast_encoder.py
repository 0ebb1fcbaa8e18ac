"""Texts to tokens eight times as fast as the tokenizer itself does it, where fastokens knows its kind.

What counts are the tokens of the tokenizer: they are compared before fastokens is used, and for a text of every batch.
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
"""Texts on which both must agree before one stands for the other."""


class QuickEncoder:
    """Encodes batches of texts as a tokenizer does."""

    def __init__(self, backend: Any) -> None:
        """Take a ``tokenizers.Tokenizer``, which decides what is right."""
        self.backend = backend
        self.quick = _quick(backend)

    def __call__(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[np.ndarray]:
        """Ids of each text, int32; special tokens in it count as such.

        Raises:
            RequestError: fastokens gives other tokens than the tokenizer.
        """
        texts = list(texts)
        if self.quick is None or not texts:
            return self._exact(texts, add_special_tokens)
        try:
            encoded = _encode(self.quick, texts, add_special_tokens)
        except ValueError:  # it refuses a byte that the vocabulary lacks, which the tokenizer passes over
            return self._exact(texts, add_special_tokens)
        checked = len(texts) // 2
        if encoded[checked].tolist() != self.backend.encode(texts[checked], add_special_tokens=add_special_tokens).ids:
            raise RequestError(
                f"fastokens and tokenizers give different tokens for {texts[checked][:100]!r}; "
                "take fastokens away (pip uninstall fastokens): raysft does without it, slower"
            )
        return encoded

    def _exact(self, texts: list[str], add_special_tokens: bool) -> list[np.ndarray]:
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]


def _encode(quick: Any, texts: list[str], add_special_tokens: bool) -> list[np.ndarray]:
    ids, ends = quick.encode_batch_flat(texts, add_special_tokens)
    return np.split(
        np.frombuffer(ids, np.uint32).astype(np.int32), np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64)
    )


def _quick(backend: Any) -> Any:
    """The tokenizer in fastokens; None where that is not installed, does not know its kind or gives other tokens."""
    try:
        import fastokens

        quick = fastokens.Tokenizer.from_json_str(backend.to_str())
    except (ImportError, ValueError):
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    texts = [
        *PROBES,
        *(text.join(PROBES[2:4]) for text in added[:1000]),
        *(f" {text} {text}x" for text in added[:1000]),
    ]
    for special in (False, True):
        for text, right in zip(texts, backend.encode_batch_fast(texts, add_special_tokens=special), strict=True):
            try:
                (ids,) = _encode(quick, [text], special)
            except ValueError:  # a byte that the vocabulary lacks: such batches go to the tokenizer
                continue
            if ids.tolist() != right.ids:
                return None
    return quick
