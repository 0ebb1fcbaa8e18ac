"""This machine's copies of remote files: models, shared by all processes, and the small files of runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

from raysft.errors import RequestError
from raysft.storage import hub, hub_snapshots, modelscope
from raysft.storage.cache_home import cache_home
from raysft.storage.path import Entry, StoragePath

KEPT_DAYS = 7
"""Days after which an unused copy is removed."""


def working_copy(place: StoragePath) -> Path:
    """Return the local folder for the small files of a run in an object store."""
    # Include the options: with another ``endpoint_override`` the same bucket name is another bucket.
    return cache_home() / "runs" / hashlib.sha256(place.parent.location.encode()).hexdigest()[:16] / place.name


def local_copy(location: str) -> str:
    """Return a path that this node can open: a URI is copied once for all processes of the node, all else stays as it is.

    Of a hub model that is known by its commit, it is a folder with all except the weights, which ``model_copy`` fetches too.

    Raises:
        FileNotFoundError: the URI names nothing.
        RequestError: the hub does not give the model's files.
    """
    if on_hub(location):
        return str(hub_snapshots.fetch(location))
    if "://" not in location:
        if may_be_on_hub(location):
            hub.bound_requests()  # the caller loads from the hub by this id
        return location
    if location.startswith(modelscope.SCHEME):
        copy = modelscope.copy_of(location)
        _forget_unused(cache_home() / "copies")
        return str(copy)
    place = StoragePath.of(location)
    files = place.walk() or {"": place.entry()}  # a single file
    identity = hashlib.sha256(repr((str(place), sorted(files.items()))).encode()).hexdigest()[:16]
    target = cache_home() / "copies" / identity / place.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".lock").open("w") as lock:
            # Only processes that need this copy wait here, while one of them makes it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _fetch(place, files, target)
    os.utime(target.parent)
    _forget_unused(target.parent.parent)
    return str(target)


def may_be_on_hub(model: str) -> bool:
    """Return True if a model's location may be an id on the hub, ``NAME`` or ``ORG/NAME``."""
    return "://" not in model and not model.startswith((".", "/", "~")) and model.count("/") <= 1


def on_hub(location: str) -> bool:
    """Return True for a model on the hub that is known by its commit or revision, ``NAME@REVISION``."""
    return "@" in location and may_be_on_hub(location) and not Path(location).exists()


def model_copy(model: str) -> Path:
    """Return a model's folder on this node, fetched from its object store or, into the hub's own cache, from the hub.

    Raises:
        RequestError: the model is nowhere.
    """
    if may_be_on_hub(model) and not Path(model).is_dir():
        return hub_snapshots.fetch(model, weights=True)
    try:
        return Path(local_copy(model))
    except FileNotFoundError:
        raise RequestError(f"{StoragePath.of(model)}: there is no such file or folder; check the path") from None


def _fetch(place: StoragePath, files: dict[str, Entry], target: Path) -> None:
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        for name, entry in files.items():
            file = draft / name if name else draft
            (place / name if name else place).download(file)
            os.utime(file, ns=(entry.modified, entry.modified))  # fingerprints include it
        draft.replace(target)
    finally:
        StoragePath(str(draft)).remove()


def _forget_unused(copies: Path) -> None:
    for folder in copies.iterdir():
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(folder, ignore_errors=True)
