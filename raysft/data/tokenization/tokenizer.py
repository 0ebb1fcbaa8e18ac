"""A model's tokenizer, loaded once by the driver and sent to the tasks in parts that need no transformers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raysft.data.tokenization.token_spans import SpanEncoder
from raysft.errors import RequestError
from raysft.models.tokenizer import load_tokenizer

CACHED_WORDS = 100_000
"""Words whose tokens the tokenizer remembers, about 10 MB. Its default of 10,000 is less than a corpus has and a tenth slower."""
load_once = lru_cache(maxsize=2)(load_tokenizer)
"""Load a model's tokenizer, once in a process: that takes a second if the vocabulary is large."""


@dataclass(frozen=True)
class Tokenizer:
    """The parts of a model's tokenizer that the tasks need."""

    backend: str
    """The fast tokenizer as JSON (``tokenizer.json``)."""
    template: str | None
    """The chat template."""
    tool_template: str | None
    """The chat template for conversations with tools, if the tokenizer has its own (``tool_use``)."""
    special_tokens: dict[str, Any]
    """Name → token, for the template."""
    control_tokens: tuple[str, ...]
    """Special tokens as a text could contain them."""
    eos: int | None
    identity: str
    """Hash of all the above."""

    @classmethod
    def load(cls, model: str, chat_template: str | None = None, runs_code: bool = False) -> Tokenizer:
        """Load a model's tokenizer and take it apart.

        Args:
            model: folder or hub id.
            chat_template: Jinja text to use instead of the tokenizer's own.
            runs_code: allow the model's own code to run in this process. The tasks need none of it.

        Raises:
            RequestError: the model has no fast tokenizer.
        """
        tokenizer = load_once(model, runs_code)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(f"{model}: has no fast tokenizer (tokenizer.json); choose a model that has one")
        own = tokenizer.chat_template
        named = own if isinstance(own, dict) else {"default": own}
        parts = {
            "backend": backend.to_str(),
            "template": chat_template or named.get("default"),
            "tool_template": None if chat_template else named.get("tool_use"),
            "special_tokens": dict(tokenizer.special_tokens_map),
            "control_tokens": tuple(
                sorted(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
            ),
            "eos": tokenizer.eos_token_id,
        }
        return cls(**parts, identity=hashlib.sha256(repr(parts).encode()).hexdigest())  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def load_backend(identity: str, backend: str, plain: bool = False) -> Any:
    """Load a ``tokenizers.Tokenizer``.

    Args:
        identity: hash of the tokenizer, a short key for the cache.
        backend: the tokenizer as JSON.
        plain: encode special tokens in a text as ordinary characters.
    """
    import tokenizers

    loaded = tokenizers.Tokenizer.from_str(backend)
    if isinstance(loaded.model, tokenizers.models.BPE | tokenizers.models.Unigram):
        loaded.model._resize_cache(CACHED_WORDS)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.encode_special_tokens = plain
    return loaded


@lru_cache(maxsize=2)
def load_span_encoder(identity: str, backend: str) -> SpanEncoder:
    """Load a tokenizer's ``SpanEncoder``; it is compared with fastokens once."""
    return SpanEncoder(load_backend(identity, backend))
