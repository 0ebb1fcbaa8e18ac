"""Check the weight files of a model or an adapter without reading the weights."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysft.errors import RequestError
from raysft.models.adapter_files import MADE
from raysft.storage.hub_snapshots import is_snapshot

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files, in the order in which peft and transformers look for them; others are not read."""


EMBEDDINGS = (
    ".embed_tokens.weight",
    ".wte.weight",
    ".word_embeddings.weight",
    ".embed_in.weight",
    ".tok_embeddings.weight",
)
"""Suffixes of the names of token embeddings in most transformers models."""


def check_weights(folder: Path, named: str) -> None:
    """Refuse weights that are missing or damaged, without reading them.

    Args:
        folder: folder of a model or an adapter.
        named: the folder as messages name it, ``model.path=PATH``.

    Raises:
        RequestError: names the file and the remedy.
    """
    if not folder.is_dir():
        return
    try:
        _check_files(folder, named)
    except RequestError as error:
        if not MADE.fullmatch(folder.name):
            raise
        fact = str(error).rpartition(";")[0]
        raise RequestError(f"{fact}; remove that folder of the cache, so that it is made again") from None


def _check_files(folder: Path, named: str) -> None:
    adapter = [folder / name for name in ADAPTER_FILES if (folder / name).exists()]
    found = next(iter(adapter or [folder / name for name in MODEL_FILES if (folder / name).exists()]), None)
    if found is None:
        raise RequestError(
            f"{named}: contains no weights (*.safetensors); use a complete model, or copy or train it again"
        )
    for file in _parts(found, named) if found.suffix == ".json" else [found]:
        check = _check_safetensors if file.suffix == ".safetensors" else _check_bin
        check(file, named)


def _parts(index: Path, named: str) -> list[Path]:
    """List the files that an index of weights names."""
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
        with safe_open(file, framework="np"):  # reads the header and compares it with the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{named}: {file.name} is damaged ({error}); copy it again") from None


def _check_bin(file: Path, named: str) -> None:
    """Check weights in the old pickle format, which must hold tensors only; transformers loads nothing else from them."""
    import torch

    try:
        # Names and shapes only; the numbers stay on disk, except in files older than torch 1.6.
        content = torch.load(file, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, struct.error, EOFError):
        content = None
    if not isinstance(content, dict):
        raise RequestError(
            f"{named}: {file.name} is damaged, or holds more than tensors, which could run code; use a model "
            "in *.safetensors"
        )


def embedding_rows(folder: Path, hf_config: Any, named: str) -> int | None:
    """Number of tokens that a model has embeddings for, by its weights or else its config.

    Args:
        folder: the model's folder; does not exist for a model on the Hub.
        hf_config: the model's config.
        named: the folder as messages name it, ``model.path=PATH``.

    Raises:
        RequestError: weights and config disagree, so the model cannot be loaded.
    """
    in_config = getattr(hf_config.get_text_config(), "vocab_size", None)
    in_weights = _rows_in_weights(folder, named)
    if in_weights and in_config and in_weights != in_config and _rows_of_config(hf_config) not in (in_weights, None):
        raise RequestError(
            f"{named}: config.json has vocab_size={in_config}, but its weights hold {in_weights} embeddings; "
            "correct vocab_size, or copy the model again"
        )
    return in_weights or in_config


def open_weights(folder: Path, named: str, framework: str = "np") -> Iterator[Any]:
    """Yield each weight file of a model, open to be read in slices; nothing for a model without ``*.safetensors``.

    Args:
        folder: the model's folder.
        named: the folder as messages name it, ``model.path=PATH``.
        framework: ``np`` or ``pt``, which also reads bfloat16.
    """
    from safetensors import safe_open

    for file in safetensors_files(folder, named):
        with safe_open(file, framework=framework) as weights:
            yield weights


def safetensors_files(folder: Path, named: str) -> list[Path]:
    """Return the weight files that transformers loads for a model; none for a model without ``*.safetensors``.

    Others may lie next to them, such as those of an earlier state. Arguments as for ``open_weights``.
    """
    whole, index = (folder / name for name in MODEL_FILES[:2])
    if whole.exists():
        return [whole]
    partial = is_snapshot(folder)  # its weights may not be here yet
    return _parts(index, named) if index.exists() and not partial else sorted(folder.glob("model*.safetensors"))


def _rows_in_weights(folder: Path, named: str) -> int | None:
    """Rows of the embeddings in a model's files; None if no name is known."""
    shapes = []
    for weights in open_weights(folder, named):
        names = [name for name in weights.keys() if f".{name}".endswith(EMBEDDINGS)]  # noqa: SIM118
        shapes += [weights.get_slice(name).get_shape() for name in names]
    return max((shape[0] for shape in shapes if len(shape) == 2), default=None)


def holds_embeddings(adapter: Path) -> bool:
    """Return True if an adapter's weights have token embeddings among them."""
    return any(name.endswith(EMBEDDINGS) for name in adapter_shapes(adapter))


def adapter_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's weights by name."""
    import torch
    from safetensors import safe_open

    exact, pickled = (adapter / name for name in ADAPTER_FILES)
    if not exact.exists():
        loaded = torch.load(pickled, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(pickled))
        return {name: tuple(weight.shape) for name, weight in loaded.items()}
    with safe_open(exact, framework="np") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _rows_of_config(hf_config: Any) -> int | None:
    """Rows of the embeddings that transformers creates for a config; None if the model's own code decides."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from raysft.models.model_class import auto_class

    if type(hf_config) not in {*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}:
        return None
    with torch.device("meta"):
        return auto_class(hf_config).from_config(hf_config).get_input_embeddings().weight.shape[0]
