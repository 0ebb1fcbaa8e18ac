"""A model's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError, one_line
from raysft.models.adapter_files import adapter_base
from raysft.models.processor_files import processor_template
from raysft.models.remote_code import runs_code
from raysft.storage import hub
from raysft.storage.local_cache import local_copy


def load_tokenizer(model: str, runs_code: bool = False, gguf_file: str | None = None) -> Any:
    """Load a model's tokenizer, with the chat template of the processor to which it belongs.

    Args:
        model: folder, URI or Hub id.
        runs_code: True if code that comes with the model may run.
        gguf_file: the file in the folder to read it from, instead of a tokenizer's own files.

    Raises:
        RequestError: there is no tokenizer, or its files are damaged.
    """
    from transformers import AutoTokenizer

    # transformers reports every library that it tries on a tokenizer.model; the error below has the outcome.
    logging.getLogger("transformers.tokenization_utils_tokenizers").setLevel(logging.ERROR)
    try:
        options = {"gguf_file": gguf_file} if gguf_file else {}
        folder = local_copy(model)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=runs_code, **options)
    except Exception as error:  # tokenizers, which reads tokenizer.json, raises no other
        named = f"{model}/{gguf_file}" if gguf_file else model
        remedy = "convert the model again" if gguf_file else "put its files (tokenizer.json, …) into the folder"
        fault = hub.reason_of(error)
        why = f": {fault}" if fault else f" ({one_line(error, 160)}); {remedy}"
        raise RequestError(f"{named}: its tokenizer cannot be loaded{why}") from None
    tokenizer.chat_template = processor_template(Path(folder)) or tokenizer.chat_template
    return tokenizer


def tokenizer_folder(model: Path) -> Path:
    """Return the folder of a model's tokenizer: the model's own, or that of its base if an adapter brings none."""
    base = adapter_base(model)
    own = any((model / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    return model if base is None or own else base


def tokenizer_of(config: Config, folder: Path) -> Any:
    """Load the tokenizer that belongs to a model or an adapter."""
    return load_tokenizer(str(tokenizer_folder(folder)), runs_code(config, folder))
