"""The weight files of a model or an adapter, checked without reading the weights."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from raysft.errors import RequestError

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where weights lie, in the order in which peft and transformers look for them; others beside these are not read."""


EMBEDDINGS = (
    ".embed_tokens.weight",
    ".wte.weight",
    ".word_embeddings.weight",
    ".embed_in.weight",
    ".tok_embeddings.weight",
)
"""How the names of token embeddings end in most models of transformers."""


def check_weights(folder: Path, named: str) -> None:
    """Find out, without reading them, that weights are missing or damaged; those of a model that lies on the hub are looked at
    when they are there.

    Args:
        folder: that of a model or an adapter.
        named: the folder as messages name it, ``model.path=PATH``.

    Raises:
        RequestError: with the file and the remedy.
    """
    if not folder.is_dir():
        return
    adapter = [folder / name for name in ADAPTER_FILES if (folder / name).exists()]
    found = next(iter(adapter or [folder / name for name in MODEL_FILES if (folder / name).exists()]), None)
    if found is None:
        raise RequestError(f"{named}: holds no weights (*.safetensors); give a whole model, or copy or train it again")
    for file in _parts(found, named) if found.suffix == ".json" else [found]:
        check = _check_safetensors if file.suffix == ".safetensors" else _check_bin
        check(file, named)


def _parts(index: Path, named: str) -> list[Path]:
    """The files that an index of weights names."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
        whole = isinstance(content["metadata"], dict) and all(isinstance(name, str) for name in names)
    except (ValueError, KeyError, AttributeError, TypeError):
        whole, names = False, []
    if not whole or not names:
        raise RequestError(f"{named}: {index.name} is damaged; copy it again")
    parts = [index.parent / name for name in names]
    gone = [part.name for part in parts if not part.exists()]
    if gone:
        raise RequestError(f"{named}: {gone[0]} is missing ({len(gone)} of {len(parts)} parts are); copy it again")
    return parts


def _check_safetensors(file: Path, named: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # reads the names, and compares them with the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{named}: {file.name} is damaged ({error}); copy it again") from None


def _check_bin(file: Path, named: str) -> None:
    """Weights of the old kind are pickles: they must hold tensors alone. transformers loads nothing else out of them either."""
    import torch

    try:
        # Their names and shapes; the numbers stay where they are, but in files older than torch 1.6.
        content = torch.load(file, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, struct.error, EOFError):
        content = None
    if not isinstance(content, dict):
        raise RequestError(
            f"{named}: {file.name} is damaged, or holds more than tensors, which could run code and is not "
            "loaded; give a model in *.safetensors"
        )


def embedding_rows(folder: Path, description: Any, named: str) -> int | None:
    """How many tokens a model has embeddings for: as many as its weights hold, else as its config says.

    Args:
        folder: that of the model; one on the hub has none here.
        description: the model's configuration.
        named: the folder as messages name it, ``model.path=PATH``.

    Raises:
        RequestError: the weights and the configuration disagree, so that the model cannot be loaded.
    """
    said = getattr(description.get_text_config(), "vocab_size", None)
    held = _embeddings_held(folder, named)
    if held and said and held != said and _embeddings_made(description) not in (held, None):
        raise RequestError(
            f"{named}: config.json says vocab_size={said} and its weights hold {held} embeddings; correct vocab_size, or copy "
            "the model again"
        )
    return held or said


def _embeddings_held(folder: Path, named: str) -> int | None:
    """Rows of the embeddings in a model's files; None where they cannot be told by their name."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    shapes = []
    for file in _parts(index, named) if index.exists() else folder.glob("model.safetensors"):
        with safe_open(file, framework="np") as weights:
            names = [name for name in weights.keys() if f".{name}".endswith(EMBEDDINGS)]  # noqa: SIM118
            shapes += [weights.get_slice(name).get_shape() for name in names]
    return max((shape[0] for shape in shapes if len(shape) == 2), default=None)


def _embeddings_made(description: Any) -> int | None:
    """Rows of the embeddings that transformers makes for a configuration; None where that is up to the model's own code."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(description) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(description).get_input_embeddings().weight.shape[0]
