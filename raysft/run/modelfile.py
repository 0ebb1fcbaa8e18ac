"""The ``Modelfile`` next to an exported model, from which Ollama imports it: ``ollama create NAME -f Modelfile``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.data.tokenization.go_template import go_template
from raysft.errors import RequestError
from raysft.models.tokenizer import load_tokenizer

MODELFILE = "Modelfile"
CONTEXT = 4096
"""Tokens of context that Ollama reserves unless the training had longer rows: its own default for most models."""
IMPORTED = ("mxfp4",)
"""Quantized types that Ollama imports as they are."""


def write_modelfile(folder: Path, config: Config | None, runs_code: bool) -> str:
    """Write the Modelfile of a whole model in a folder, with its chat template in Go's language.

    Returns:
        Why it was not written; empty if it was.
    """
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (method := _quantized(description)) and method not in IMPORTED:
        return f"its weights are quantized ({method}), which Ollama cannot import; export the unquantized model"
    try:
        tokenizer = load_tokenizer(str(folder), runs_code)
    except RequestError:
        return "the model has no tokenizer"
    template = tokenizer.chat_template
    if not template:
        return "the model has no chat template"
    if "strftime_now" in str(template):
        return "its chat template writes the date"
    text = go_template(lambda messages, prompts: _rendered(tokenizer, messages, prompts))
    if text is None:
        return "its chat template cannot be expressed as a Go template"
    lines = ["FROM .", "", f'TEMPLATE """{text}"""', ""]
    system = config.data.default_system if config is not None else None
    if system and '"""' not in system and "{{ .System }}" in text:
        lines += [f'SYSTEM """{system}"""', ""]
    lines += [f'PARAMETER stop "{stop}"' for stop in _stops(folder, tokenizer)]
    lines += [f"PARAMETER num_ctx {_context(description, config)}", ""]
    (folder / MODELFILE).write_text("\n".join(lines), encoding="utf-8")
    return ""


def _rendered(tokenizer: Any, messages: Sequence[Any], prompts: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompts)
    # Ollama adds to a prompt the token that the tokenizer adds to a text.
    adds = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds else text


def _stops(folder: Path, tokenizer: Any) -> list[str]:
    path = folder / "generation_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    texts = dict.fromkeys(tokenizer.convert_ids_to_tokens(token) for token in ids if isinstance(token, int))
    return [text for text in texts if text and not re.search(r'["\s\\]', text)]


def _quantized(description: dict[str, Any]) -> str | None:
    for part in (description, description.get("text_config") or {}):
        if settings := part.get("quantization_config"):
            return str(settings.get("quant_method") or "bitsandbytes")  # which its older versions left out
    return None


def _context(description: dict[str, Any], config: Config | None) -> int:
    parts = (description, description.get("text_config") or {})
    known = (part.get(key) for part in parts for key in ("max_position_embeddings", "n_positions"))
    most = next((value for value in known if isinstance(value, int)), CONTEXT)
    return min(most, max(CONTEXT, config.data.sequence_length if config is not None else 0))
