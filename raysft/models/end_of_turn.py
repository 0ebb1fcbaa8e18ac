"""The tokens that end a turn, as a trained model's files name them.

A base model's EOS token ends documents. Training on conversations teaches it another token, and whatever loads the trained
model must stop there. Files that already name the token stay unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def use_as_eos(tokenizer: Any, ends: Sequence[int]) -> None:
    """Make the token that ends most turns the tokenizer's EOS token, unless its EOS token ends turns too.

    The chat template keeps the text that it was trained with, also where it writes ``eos_token``.

    Args:
        tokenizer: the one that is saved with the trained model.
        ends: token ids that end an assistant turn, the most frequent first.
    """
    if not ends or tokenizer.eos_token_id in ends:
        return
    former = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _with_eos(text, former) for name, text in template.items()}
    elif template:
        tokenizer.chat_template = _with_eos(template, former)


def _with_eos(template: str, eos: str | None) -> str:
    r"""Fix the value of a chat template's ``eos_token``.

    >>> _with_eos("{{ eos_token }}", "</s>")
    '{% set eos_token = "</s>" %}\n{{ eos_token }}'
    """
    if "eos_token" not in template:
        return template
    # transformers removes the newline after a block.
    return f"{{% set eos_token = {json.dumps(eos or '', ensure_ascii=False)} %}}\n{template}"


def write_ends(folder: Path, ends: Sequence[int]) -> None:
    """Name the tokens that end a turn in the generation config and the config of a model's folder, before those named there.

    This edits the files because transformers refuses to save a changed generation config that fails its validation, and some
    published ones do.
    """
    path = folder / "generation_config.json"
    if path.exists():
        generation = json.loads(path.read_text(encoding="utf-8"))
        known = _listed(generation.get("eos_token_id"))
        if not {*ends} <= {*known}:
            generation["eos_token_id"] = [*ends, *(token for token in known if token not in ends)]
            generation.pop("_from_model_config", None)  # it would claim that config.json says the same
            path.write_text(json.dumps(generation, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / "config.json"
    if ends and path.exists():
        description = json.loads(path.read_text(encoding="utf-8"))
        parts = [part for part in (description, description.get("text_config")) if part and "eos_token_id" in part]
        lacking = [part for part in parts or [description] if not {*_listed(part.get("eos_token_id"))} & {*ends}]
        for part in lacking:
            named = part.get("eos_token_id")
            part["eos_token_id"] = [ends[0], *named] if isinstance(named, list) else ends[0]
        if lacking:
            path.write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def learned_ends(folder: Path, tokenizer: Any) -> list[int]:
    """Return the EOS token of a folder's tokenizer, in a list, if the generation config next to it stops there."""
    path = folder / "generation_config.json"
    stops = _listed(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")) if path.exists() else []
    return [tokenizer.eos_token_id] if tokenizer.eos_token_id in stops else []


def _listed(tokens: Any) -> list[int]:
    return list(tokens) if isinstance(tokens, list) else [] if tokens is None else [tokens]
