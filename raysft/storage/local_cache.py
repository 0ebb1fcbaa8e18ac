"""What a machine keeps of places elsewhere: copies of models for all its processes, and the small files of runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raysft.errors import RequestError
from raysft.storage import hub
from raysft.storage.path import Entry, StoragePath

KEPT_DAYS = 7
"""How long a copy that nobody asks for stays on a node."""

BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files of a model besides its weights, which are on the hub in several forms at once."""


def cache_home() -> Path:
    """What this machine keeps of other places."""
    return Path.home() / ".cache" / "raysft"


def working_copy(place: StoragePath) -> Path:
    """The local folder in which the small files of a run in an object store are read and written."""
    # With its options: the same bucket of another server (``endpoint_override``) is another one.
    return cache_home() / "runs" / hashlib.sha256(place.parent.location.encode()).hexdigest()[:16] / place.name


def local_copy(location: str) -> str:
    """A path that this node can open: what is no URI as it is, else a copy that all processes of the node share.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if "://" not in location:
        if may_be_on_hub(location):
            hub.be_patient()  # whoever asks for this path loads from it
        return location
    place = StoragePath.of(location)
    files = place.walk() or {"": place.entry()}  # a single file
    identity = hashlib.sha256(repr((str(place), sorted(files.items()))).encode()).hexdigest()[:16]
    target = cache_home() / "copies" / identity / place.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("w") as lock:
            # Only those who want this one copy wait here, and only while one of them fetches it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _fetch(place, files, target)
    os.utime(target.parent)
    _forget_unused(target.parent.parent)
    return str(target)


def may_be_on_hub(model: str) -> bool:
    """Whether a model's location has the form of an id on the hub, ``NAME`` or ``ORG/NAME``."""
    return "://" not in model and not model.startswith((".", "/", "~")) and model.count("/") <= 1


def model_copy(model: str) -> Path:
    """A model's folder on this node; what lies in an object store or on the hub is fetched, from the hub into its own cache.

    Raises:
        RequestError: neither this node, nor the object store, nor the hub has it.
    """
    try:
        folder = Path(local_copy(model))
    except FileNotFoundError:
        raise RequestError(f"{StoragePath.of(model)}: there is no such file or folder; check the path") from None
    if folder.is_dir() or not may_be_on_hub(model):
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=[*BESIDE_WEIGHTS, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(model, allow_patterns=[*BESIDE_WEIGHTS, "*.bin"])
    except hub.failures() as error:
        raise RequestError(f"{model}: is no folder here, and {hub.reason_of(error) or hub.NONSENSE}") from None
    return folder


def _fetch(place: StoragePath, files: dict[str, Entry], target: Path) -> None:
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        for name, entry in files.items():
            file = draft / name if name else draft
            (place / name if name else place).download(file)
            os.utime(file, ns=(entry.modified, entry.modified))  # by which others know it again
        draft.replace(target)
    finally:
        StoragePath(str(draft)).remove()


def _forget_unused(copies: Path) -> None:
    for folder in copies.iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)


def in_cache(target: StoragePath, write: Callable[[Path], None]) -> StoragePath:
    """A model folder in the cache, written by whoever comes first; others wait for it."""
    if (target / "config.json").exists():
        return target
    # For an object store it is made here; machines that make the same one at once put the same files there.
    beside = target.local.parent if target.local else cache_home() / "models"
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / f".{target.name}.lock").open("w") as lock:
        # Only those who want this one model wait here, and only while one of them works on it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "config.json").exists():
            draft = beside / f".{target.name}.{uuid.uuid4().hex}"
            try:
                write(draft)
                if target.local:
                    draft.replace(target.local)
                else:
                    target.upload(draft, last="config.json")
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return target
