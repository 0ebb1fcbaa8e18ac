"""A model's tokenizer: loaded once by the driver, and sent to the tasks in parts that need no transformers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raysft.data.tokenization.token_spans import SpanEncoder
from raysft.errors import RequestError
from raysft.models.tokenizer import load_tokenizer

CACHED_WORDS = 100_000
"""Words whose tokens are remembered, some 10 MB; the library's own 10,000 are fewer than a corpus has, and a tenth slower."""
load_once = lru_cache(maxsize=2)(load_tokenizer)
"""A model's tokenizer, loaded once in a process: it takes a second where the vocabulary is large."""


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, as it travels to the tasks."""

    backend: str
    """The fast tokenizer as JSON (``tokenizer.json``)."""
    template: str | None
    """The chat template."""
    tool_template: str | None
    """The one for conversations with functions, where the tokenizer has one of that name."""
    special_tokens: dict[str, Any]
    """Name → token, for the template."""
    control_tokens: tuple[str, ...]
    """Special tokens as they would be written in a text."""
    eos: int | None
    identity: str
    """Hash of all that."""

    @classmethod
    def load(cls, model: str, chat_template: str | None = None, runs_code: bool = False) -> Tokenizer:
        """Take a tokenizer apart.

        Args:
            model: folder or hub id.
            chat_template: Jinja text to use instead of the tokenizer's own.
            runs_code: code that comes with the model may run, here; the tasks need none of it.

        Raises:
            RequestError: there is no fast tokenizer.
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
def backend_of(identity: str, backend: str, plain: bool) -> Any:
    """The tokenizer; a ``plain`` one takes special tokens in a text for characters."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(backend)
    if isinstance(made.model, tokenizers.models.BPE | tokenizers.models.Unigram):
        made.model._resize_cache(CACHED_WORDS)
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = plain
    return made


@lru_cache(maxsize=2)
def span_encoder(identity: str, backend: str) -> SpanEncoder:
    return SpanEncoder(backend_of(identity, backend, plain=False))
