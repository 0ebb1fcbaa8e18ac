"""GGUF files, converted to safetensors once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from raysft.errors import RequestError, one_line
from raysft.models.loading import load_weights
from raysft.models.tokenizer import load_tokenizer
from raysft.models.transformers_internals import forget_quantizer
from raysft.storage.model_cache import in_cache
from raysft.storage.path import StoragePath


def converted(file: Path, cache: StoragePath, notify: Callable[[str], None], key: str) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]

    def write(folder: Path) -> None:
        notify(f"model: {file.name} is converted to safetensors, once, in {target}")
        with _quiet():
            _convert(file, folder, key)

    target = cache / "models" / f"{file.stem}-{digest}"
    return in_cache(target, write, notify).location


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, and without DeepSpeed's message that there is no GPU: saving imports it."""
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _convert(file: Path, folder: Path, key: str) -> None:
    import torch

    # Files next to it might name code; a GGUF needs none.
    what: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    try:
        model = load_weights(file.parent, dtype=torch.float32, **what)
        tokenizer = load_tokenizer(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{key}={file}: transformers cannot read this GGUF file ({one_line(error)})") from None
    forget_quantizer(model)  # transformers would refuse to save it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
