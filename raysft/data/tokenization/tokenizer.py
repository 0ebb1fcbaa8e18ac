"""A model's tokenizer, loaded once by the driver and sent to the tasks in parts that need no transformers."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from raysft.data.tokenization import chat_template as templates
from raysft.data.tokenization.token_spans import SpanEncoder
from raysft.errors import RequestError
from raysft.models.processor import ProcessorFiles, file_template, has_processor, load_processor
from raysft.models.tokenizer import load_tokenizer
from raysft.storage.local_cache import local_copy

CACHED_WORDS = 100_000
"""Words whose tokens the tokenizer remembers, about 10 MB. Its default of 10,000 is less than a corpus has and a tenth slower."""
load_once = lru_cache(maxsize=2)(load_tokenizer)
"""Load a model's tokenizer, once in a process: that takes a second if the vocabulary is large."""
load_processor_once = lru_cache(maxsize=2)(load_processor)
"""Load a model's processor, once in a process."""


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
    processor: TokenizingProcessor | None = None
    """Of a model for text and images."""

    @classmethod
    def load(cls, model: str, chat_template: str | None = None, runs_code: bool = False) -> Tokenizer:
        """Load a model's tokenizer and take it apart.

        Args:
            model: folder or Hub id.
            chat_template: Jinja text to use instead of the tokenizer's own.
            runs_code: allow the model's own code to run in this process. The tasks need none of it.

        Raises:
            RequestError: the model has no fast tokenizer.
        """
        processor = TokenizingProcessor.of(model, runs_code)
        if processor and processor.image_token:  # it may have added tokens to its tokenizer
            tokenizer = load_processor_once(local_copy(model), runs_code).tokenizer
        else:
            tokenizer = load_once(model, runs_code)
        own = own_chat_template(model, runs_code)
        named = own if isinstance(own, dict) else {"default": own}
        special_tokens = dict(tokenizer.special_tokens_map)
        default = named.get("default")
        if processor and processor.image_token and chat_template and default:
            images = templates.chat_template(default, special_tokens, processor.image_token).images
            processor = replace(processor, words=images.words if images else "")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(f"{model}: has no fast tokenizer (tokenizer.json); choose a model that has one")
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        parts = {
            "backend": backend.to_str(),
            "template": chat_template or default,
            "tool_template": None if chat_template else named.get("tool_use"),
            "special_tokens": special_tokens,
            "control_tokens": tuple(sorted(special.union(processor.media_tokens if processor else ()))),
            "eos": tokenizer.eos_token_id,
        }
        identity = hashlib.sha256(repr((parts, processor) if processor else parts).encode()).hexdigest()
        return cls(**parts, identity=identity, processor=processor)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TokenizingProcessor:
    """What the tasks need of a model's processor."""

    files: ProcessorFiles
    image_token: str = ""
    """The token that a chat template writes for an image."""
    media_tokens: tuple[str, ...] = ()
    """The tokens that stand for images, videos and sound."""
    words: str = ""
    """What the model's own chat template writes for an image."""
    fault: str = ""
    """Why it cannot be used for images."""

    @classmethod
    def of(cls, model: str, runs_code: bool) -> TokenizingProcessor | None:
        """Load a model's processor and take it apart; None if the model has none."""
        folder = local_copy(model)
        if not has_processor(folder):
            return None
        files = ProcessorFiles.of(folder, runs_code)
        try:
            processor = load_processor_once(folder, runs_code)
        except RequestError as error:
            return cls(files, fault=str(error))
        if not hasattr(processor, "tokenizer"):
            return None  # files of a part for sound or images alone
        names = [f"{kind}_token" for kind in ("image", "video", "audio")]
        # Some write one token for an image, and put others in its place.
        known = {getattr(part, name, None) for part in (processor, processor.tokenizer) for name in names}
        token = str(getattr(processor, "image_token", None) or "")
        fault = "" if token else f"{model}: its processor has no image token; choose another model"
        return cls(files, token, tuple(sorted(str(each) for each in known if each)), fault=fault)


def own_chat_template(model: str, runs_code: bool = False) -> str | dict[str, str] | None:
    """Return the chat template that comes with a model: that of its processor, or else of its tokenizer."""
    folder, own = local_copy(model), None
    if has_processor(folder):
        with suppress(RequestError):
            own = getattr(load_processor_once(folder, runs_code), "chat_template", None)
        own = own or file_template(folder)
    return own or load_once(model, runs_code).chat_template


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
