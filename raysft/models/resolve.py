"""Find a model: a folder, a URI, a Hub id or a GGUF file, which is converted once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pyarrow import ArrowException

from raysft.config import locate
from raysft.errors import RequestError, StorageFailed, unreadable
from raysft.models.gguf import converted
from raysft.storage import hub, hub_snapshots
from raysft.storage.local_cache import local_copy, may_be_on_hub
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import MODEL_MARKS


def find_model(
    path: str,
    cache: StoragePath,
    notify: Callable[[str], None],
    key: str = "model.path",
    accept_adapter: bool = False,
    revision: str | None = None,
) -> str:
    """Return a folder, URI or Hub id with its commit that every later stage can load from, on each node through ``local_copy``.

    A GGUF file is dequantized to safetensors once, in the cache; a second process waits for the first one's.

    Args:
        path: folder, URI, Hub id or GGUF file.
        cache: folder for converted models.
        notify: receives a line for the user before something that takes long.
        key: the config key of the path, for messages.
        accept_adapter: accept an adapter instead of a whole model.
        revision: branch, tag or commit of a model on the Hub. Default: its main branch, or what follows an ``@`` in the path.

    Raises:
        RequestError: there is no such model.
    """
    given, path, marks = path, locate(path, key), MODEL_MARKS if accept_adapter else ("config.json",)
    folder = Path(path).expanduser()
    if revision and (given != path or not may_be_on_hub(path) or path.endswith(".gguf") or folder.exists()):
        raise RequestError(
            f"model.revision={revision} names a Hub revision, but {key}={given} is not a Hub id; remove model.revision"
        )
    if "://" in path:
        return _elsewhere(StoragePath.of(path), cache, notify, key, marks)
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise RequestError(f"{key}={path}: GGUF file not found; check the path")
        return converted(Path(path), cache, notify, key)
    if folder.is_dir():
        if not any((folder / mark).exists() for mark in marks):
            remedy = _of_run(folder) or "use a model folder in Hugging Face format"
            raise RequestError(f"{key}={path}: the folder contains no {' or '.join(marks)}; {remedy}")
        return str(folder.absolute())
    if folder.exists():
        raise RequestError(
            f"{key}={path}: is a file, not a model folder; use the folder that contains it, or a GGUF file (*.gguf)"
        )
    if not may_be_on_hub(path):
        remedy = _of_run(folder) or "check the path, or use a Hub id"
        raise RequestError(f"{key}={path}: folder not found; {remedy}")
    return find_on_hub(path, key, notify, revision, marks)


def _of_run(folder: Path) -> str | None:
    """What to use instead of a run directory, or of one of its checkpoints; None for any other folder."""
    if (folder / "config.yaml").exists() and (folder / "model").is_dir():
        return f"use the trained model of this run, {folder / 'model'}"
    if folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").exists():
        return f"export this checkpoint (raysft export {folder} --output DIR), and use that folder"
    return None


def _elsewhere(
    place: StoragePath, cache: StoragePath, notify: Callable[[str], None], key: str, marks: Sequence[str]
) -> str:
    """Return the URI of a model in object storage, or the folder that its GGUF file was converted to."""
    try:
        with retry_for(FIRST_SECONDS, notify):
            copy = Path(local_copy(place.location))
    except FileNotFoundError:
        raise RequestError(f"{key}={place}: not found; check the path") from None
    except RequestError as error:
        # ModelScope's errors begin with the location.
        raise type(error)(f"{key}={error}" if str(error).startswith("ms://") else str(error)) from None
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


def find_on_hub(
    path: str,
    key: str,
    notify: Callable[[str], None],
    revision: str | None = None,
    marks: Sequence[str] = ("config.json",),
) -> str:
    """Check that the Hub or its local cache has a model, and return its id with the commit that every node takes.

    Args:
        path: ``NAME`` or ``NAME@REVISION``.
        key: the config key of the path, for messages.
        notify: receives a line with the commit.
        revision: branch, tag or commit, if the path has none.
        marks: a file that the model must have, or several, one of which it must have.
    """
    name, own = hub_snapshots.split(path)
    asked = own or revision
    named = f"{key}={name}" + (f" at {asked}" if asked else "")
    try:
        location = hub_snapshots.pin(name, asked)
        folder = Path(local_copy(location))
        if not any((folder / mark).exists() for mark in marks):
            missing = f"the Hub has no {' or '.join(marks)} of it"
            raise RequestError(f"{named}: {missing}; use a model in Hugging Face format")
        if (folder / "config.json").exists():
            _check_mapping(folder / "config.json")
    except RequestError as error:
        raise RequestError(str(error) if str(error).startswith(key) else f"{key}={error}") from None
    except Exception as error:
        raise RequestError(f"{named}: not a local folder, and {hub.reason_of(error) or hub.UNUSABLE}") from None
    if not hub_snapshots.holds_weights(location):
        raise RequestError(f"{named}: the Hub has no weights of it (*.safetensors); use a complete model")
    notify(
        f"model: {name} is pinned to commit {location.partition('@')[2][: hub_snapshots.SHORT]}"
        + (f" ({asked})" if asked else "")
    )
    return location


def _check_mapping(file: Path) -> None:
    if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
        raise ValueError(f"{file.name} is not a mapping")
