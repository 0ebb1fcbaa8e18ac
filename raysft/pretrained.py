"""What lies in the folder of a model or an adapter: loaded whole, or one line that says what is wrong."""

from __future__ import annotations

import json
import logging
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

from raysft import hub
from raysft.config import RequestError
from raysft.copies import local_copy

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


def load_weights(folder: str | Path, **options: Any) -> Any:
    """A causal language model as ``from_pretrained`` loads it, with all of its weights.

    Raises:
        RequestError: the folder lacks some, which transformers would draw at random, or has others; or the hub does not give them.
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
    except OSError as error:
        if fault := hub.reason_of(error):
            raise RequestError(f"{folder}: its weights cannot be loaded: {fault}") from None
        raise
    model, lacking = loaded[0], loaded[1]["missing_keys"]
    by_bitsandbytes = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    # What other libraries call their scales is not known here.
    if lacking and (by_bitsandbytes or not getattr(model, "is_quantized", False)):
        raise RequestError(f"{folder}: lacks {len(lacking)} of the model's weights ({min(lacking)}); copy it again")
    return model


def generation_config(*folders: Path) -> Any:
    """What the first of some folders says of generation that says anything (``generation_config.json``); None where none does."""
    from transformers import GenerationConfig

    found = (folder for folder in folders if (folder / "generation_config.json").exists())
    return next((GenerationConfig.from_pretrained(folder, local_files_only=True) for folder in found), None)


def load_adapter(model: Any, folder: str | Path, **options: Any) -> Any:
    """A model with the adapter of a folder on it, as peft loads it, with all of its weights.

    Raises:
        RequestError: the folder lacks some, without which it would do nothing, or not what it has learnt; or it is of another
            model.
    """
    import torch
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder), **options)
        except UserWarning as warning:
            lacking = str(warning).partition(": ")[2] or str(warning)
            raise RequestError(
                f"{folder}: lacks some of the adapter's weights ({lacking:.120}); copy or train it again"
            ) from None
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.160}"
            raise RequestError(
                f"{folder}: is no adapter of this model ({reason}); give the model that it belongs to, or copy it again"
            ) from None
    if generation := generation_config(Path(folder)):
        model.generation_config = generation  # where its turns end may be what it has learnt
    return adapted


def merge_adapter(model: Any) -> Any:
    """The plain model with the weights of the adapter on it merged into its own.

    An embedding that is the output head too is one weight: where the adapter changes the one and not the other they are two
    from then on.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if any(isinstance(each, BaseTunerLayer) for each in (embedding, head)):
        inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    whole = model.merge_and_unload()
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        for described in (whole.config, whole.config.get_text_config()):
            described.tie_word_embeddings = False
    return whole


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

    # It tells at length of each library that it would try on a tokenizer.model; the error says what came of it.
    logging.getLogger("transformers.tokenization_utils_tokenizers").setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(local_copy(model), trust_remote_code=runs_code)
    except Exception as error:  # the library that reads tokenizer.json has no other
        reason = " ".join(str(error).split()) or type(error).__name__
        fault = hub.reason_of(error)
        why = f": {fault}" if fault else f" ({reason:.160}); put its files (tokenizer.json, …) into the folder"
        raise RequestError(f"{model}: its tokenizer cannot be loaded{why}") from None
