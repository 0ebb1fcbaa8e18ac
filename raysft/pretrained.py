"""What lies in the folder of a model or an adapter: loaded whole, or one line that says what is wrong."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

from raysft.config import RequestError
from raysft.copies import local_copy


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
    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise RequestError(f"{named}: holds no weights (*.safetensors); give a whole model, or copy or train it again")
    for index in folder.glob("*.safetensors.index.json" if files else "*.bin.index.json"):
        _check_index(index, named)
    for file in files:
        _check_safetensors(file, named)
    if not files:
        for file in sorted(folder.glob("*_model*.bin")):
            _check_bin(file, named)


def _check_index(index: Path, named: str) -> None:
    """An index says which file has which weight."""
    try:
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise RequestError(f"{named}: {index.name} is damaged; copy it again") from None
    gone = sorted(part for part in parts if not (index.parent / part).exists())
    if gone:
        raise RequestError(f"{named}: {gone[0]} is missing ({len(gone)} of {len(parts)} parts are); copy it again")


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
        torch.load(file, weights_only=True, map_location="meta", mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, struct.error, EOFError):
        raise RequestError(
            f"{named}: {file.name} is damaged, or holds more than tensors, which could run code and is not "
            "loaded; give a model in *.safetensors"
        ) from None


def load_weights(folder: str | Path, **options: Any) -> Any:
    """A causal language model as ``from_pretrained`` loads it, with all of its weights.

    Raises:
        RequestError: the folder lacks some, which transformers would draw at random, or has others.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise RequestError(
            f"{folder}: its weights have other shapes than its config.json says; copy it again"
        ) from None
    model, lacking = loaded[0], loaded[1]["missing_keys"]
    if lacking and not getattr(model, "is_quantized", False):  # whose scales count as weights that are not there
        raise RequestError(f"{folder}: lacks {len(lacking)} of the model's weights ({min(lacking)}); copy it again")
    return model


def load_adapter(model: Any, folder: str | Path, **options: Any) -> Any:
    """A model with the adapter of a folder on it, as peft loads it, with all of its weights.

    Raises:
        RequestError: the folder lacks some, without which it would do nothing, or not what it has learnt.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(folder), **options)
        except UserWarning as warning:
            lacking = str(warning).partition(": ")[2] or str(warning)
            raise RequestError(
                f"{folder}: lacks some of the adapter's weights ({lacking:.120}); copy or train it again"
            ) from None


def adapter_description(folder: Path) -> dict[str, Any]:
    """What an adapter's ``adapter_config.json`` holds.

    Raises:
        RequestError: it cannot be read as that.
    """
    path = folder / "adapter_config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: is no description of an adapter ({error}); copy or train it again") from None
    return description


def load_tokenizer(model: str, runs_code: bool = False) -> Any:
    """The model's tokenizer; ``runs_code``: code that comes with the model may run.

    Raises:
        RequestError: there is none, or its files are of no use.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(local_copy(model), trust_remote_code=runs_code)
    except (ValueError, ImportError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{model}: its tokenizer cannot be loaded ({reason:.160}); put its files (tokenizer.json, …) into the folder"
        ) from None
