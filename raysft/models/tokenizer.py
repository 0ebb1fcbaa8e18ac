"""A model's tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError, one_line
from raysft.models.adapters import adapter_base
from raysft.models.remote_code import runs_code
from raysft.storage import hub
from raysft.storage.local_cache import local_copy


def load_tokenizer(model: str, runs_code: bool = False) -> Any:
    """The model's tokenizer; ``runs_code``: code that comes with the model may run.

    Raises:
        RequestError: there is none, or its files are of no use.
    """
    from transformers import AutoTokenizer

    # It tells at length of each library that it would try on a tokenizer.model; the error says what came of it.
    logging.getLogger("transformers.tokenization_utils_tokenizers").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(local_copy(model), trust_remote_code=runs_code)
    except Exception as error:  # the library that reads tokenizer.json has no other
        fault = hub.reason_of(error)
        why = f": {fault}" if fault else f" ({one_line(error, 160)}); put its files (tokenizer.json, …) into the folder"
        raise RequestError(f"{model}: its tokenizer cannot be loaded{why}") from None


def tokenizer_folder(model: Path) -> Path:
    """Folder of the tokenizer that belongs to a model: its own, or that of its base where an adapter brings none."""
    base = adapter_base(model)
    own = any((model / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    return model if base is None or own else base


def tokenizer_of(config: Config, folder: Path) -> Any:
    """The tokenizer that belongs to a model, loaded."""
    return load_tokenizer(str(tokenizer_folder(folder)), runs_code(config, folder))
