"""Find a model: a folder, a URI, a hub id or a GGUF file, which is converted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pyarrow import ArrowException

from raysft.config import locate
from raysft.errors import RequestError, StorageFailed, unreadable
from raysft.models.gguf import converted
from raysft.storage import hub
from raysft.storage.local_cache import local_copy, may_be_on_hub, model_copy
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import MODEL_MARKS


def find_model(
    path: str,
    cache: StoragePath,
    notify: Callable[[str], None],
    key: str = "model.path",
    accept_adapter: bool = False,
) -> str:
    """Return a folder, URI or hub id that every later stage can load from, on each node through ``local_copy``.

    A GGUF file is dequantized to safetensors once, in the cache; a second process waits for the first one's.

    Args:
        path: folder, URI, hub id or GGUF file.
        cache: folder for converted models.
        notify: receives a line for the user before something that takes long.
        key: the config key of the path, for messages.
        accept_adapter: accept an adapter in place of a whole model.

    Raises:
        RequestError: there is no such model.
    """
    path, marks = locate(path, key), MODEL_MARKS if accept_adapter else ("config.json",)
    if "://" in path:
        return _elsewhere(StoragePath.of(path), cache, notify, key, marks)
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise RequestError(f"{key}={path}: GGUF file not found; check the path")
        return converted(Path(path), cache, notify, key)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / mark).exists() for mark in marks):
            raise RequestError(
                f"{key}={path}: the folder contains no {' or '.join(marks)}; use a model folder in Hugging Face format"
            )
        return str(folder.absolute())
    if folder.exists():
        raise RequestError(
            f"{key}={path}: is a file, not a model folder; use the folder that contains it, or a GGUF file (*.gguf)"
        )
    if not may_be_on_hub(path):
        raise RequestError(f"{key}={path}: folder not found; check the path, or use a Hub id")
    return _on_hub(path, key, marks)


def _elsewhere(
    place: StoragePath, cache: StoragePath, notify: Callable[[str], None], key: str, marks: Sequence[str]
) -> str:
    """Return the URI of a model in object storage, or the folder that its GGUF file was converted to."""
    try:
        with retry_for(FIRST_SECONDS, notify):
            copy = Path(local_copy(place.location))
    except FileNotFoundError:
        raise RequestError(f"{key}={place}: not found; check the path") from None
    except (StorageFailed, OSError, ArrowException) as error:
        message = f"{key}={place}: cannot be read ({reason_of(error)}); check the path and its credentials"
        raise unreadable(message, error) from None
    if copy.suffix == ".gguf":
        return converted(copy, cache, notify, key)
    if not any((copy / mark).exists() for mark in marks):
        raise RequestError(
            f"{key}={place}: contains no {' or '.join(marks)}; use a model folder in Hugging Face format"
        )
    return place.location


def _on_hub(path: str, key: str, marks: Sequence[str]) -> str:
    """Check that the Hub or its local cache has the model, and return its id, from which each node loads it."""
    from transformers import PreTrainedConfig

    try:
        if "adapter_config.json" in marks:
            model_copy(path)  # an adapter has no config to ask for
        else:
            hf_config, _ = PreTrainedConfig.get_config_dict(local_copy(path))  # without the model's own code
            if not isinstance(hf_config, dict):
                raise ValueError("config.json is not a mapping")
    except Exception as error:
        raise RequestError(f"{key}={path}: not a local folder, and {hub.reason_of(error) or hub.UNUSABLE}") from None
    return path
