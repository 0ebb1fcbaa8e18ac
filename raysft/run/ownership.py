"""A run directory belongs to one config, and to one process at a time."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from pyarrow import ArrowException

from raysft.config import Config, parse, with_overrides
from raysft.config.resume_effects import Effect, effect_of
from raysft.errors import RequestError, StorageFailed
from raysft.storage.lock import Locked, lock
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.terminal import Terminal

Changed = Mapping[str, list[Any]]
"""By key: [value there, value here]."""
SHOWN = 4
"""Keys that a line names with their values."""


def settled(directory: RunDirectory, config: Config) -> Config:
    """The config of a run that goes on: what ``auto`` decided when it began stays, whatever has changed since."""
    if config.train.global_batch_size != "auto" or not (begun(directory) and directory.config.exists()):
        return config
    return with_overrides(config, {"train.global_batch_size": _config_there(directory).train.global_batch_size})


def differences(directory: RunDirectory, config: Config) -> Changed:
    """The keys that would give other numbers than the config that began a run: [value there, value here].

    Raises:
        RequestError: the folder is no run directory.
    """
    if not directory.config.exists():
        place = directory.place
        if (place.local and place.local.is_file()) or any(".lock" not in name for name in place.entries()):
            raise RequestError(f"{place}: the folder is not empty and holds no config.yaml; choose another run.name")
        return {}
    there, here = _config_there(directory).numerics_keys(), settled(directory, config).numerics_keys()
    keys = [key for key in sorted({*here, *there}) if here.get(key) != there.get(key)] if begun(directory) else []
    return {key: [there.get(key), here.get(key)] for key in keys}


def _config_there(directory: RunDirectory) -> Config:
    try:
        return parse(yaml.safe_load(directory.config.read_text(encoding="utf-8")))
    except (TypeError, ValueError, yaml.YAMLError):
        raise RequestError(f"{directory.config}: is not a config of this version; choose another run.name") from None


def begun(directory: RunDirectory) -> bool:
    """Whether a training has left something in a run directory."""
    return directory.trainer_log.exists() or directory.checkpoints.exists() or directory.model.exists()


def belongs_to(directory: RunDirectory, config: Config, allow_changed: bool = False) -> Changed:
    """A run directory belongs to one config from its first step on; refuse another one that would give other numbers.

    Args:
        directory: the run's.
        config: what is asked for now.
        allow_changed: let through what may change when a run goes on, and all where there is nothing yet to go on from.

    Returns:
        What changed and was let through.

    Raises:
        RequestError: with the keys that differ.
    """
    changed = differences(directory, config)
    if not changed:
        return {}
    fixed = {key: values for key, values in changed.items() if effect_of(key) is Effect.NEVER}
    if not (directory.checkpoints.exists() or directory.model.exists()):
        fixed = {}
    if allow_changed and not fixed:
        return changed
    remedy = (
        f"{', '.join(fixed)} cannot change in a run that has begun: put it back, or choose another run.name"
        if fixed
        else "choose another run.name, or go on all the same with --allow-changed"
    )
    raise RequestError(f"{directory.place}: belongs to another config: {told(fixed or changed)}; {remedy}")


def told(changed: Changed) -> str:
    """What changed, in one line.

    >>> told({"train.epochs": [1, 3]})
    'train.epochs is 1 there and 3 here'
    """
    shown = [f"{key} is {there!r:.60} there and {here!r:.60} here" for key, (there, here) in changed.items()]
    more = f" and {len(shown) - SHOWN} more: {', '.join(list(changed)[SHOWN:])}" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


@contextmanager
def exclusive_access(directory: RunDirectory, terminal: Terminal) -> Iterator[None]:
    """Keep other processes out of a run directory; one that nothing was written into is taken away again."""
    try:
        with lock(directory.place, terminal.line):
            yield
    except Locked as error:
        raise RequestError(f"{error}; wait for it, stop it, or choose another run.name") from None
    finally:
        with suppress(OSError):
            directory.path.rmdir()  # only where it is empty


def ensure_writable(config: Config) -> None:
    """Make the folders that a run writes into.

    Raises:
        RequestError: one cannot be made.
    """
    for key, folder in (("run.storage", config.run_place.parent), ("data.cache", config.cache_directory)):
        try:
            if folder.local:
                folder.local.mkdir(parents=True, exist_ok=True)
            else:
                with retry_for(FIRST_SECONDS):
                    _probe(folder)
        except (StorageFailed, ArrowException) as error:
            raise RequestError(f"{key}: {reason_of(error)}; check the path and its credentials") from None
        except OSError as error:
            if not folder.local:
                raise RequestError(f"{key}: {folder}: {reason_of(error)}; check the path and its credentials") from None
            raise RequestError(f"{key}: {folder} cannot be made ({error.strerror}); choose another folder") from None


def _probe(folder: StoragePath) -> None:
    """Write a file, read it and take it away: a server that is no storage may say yes to everything."""
    name = f".probe-{uuid.uuid4().hex}"
    probe = folder / name
    probe.write_text(name)
    if probe.read_bytes() != name.encode():
        raise StorageFailed(f"{folder}: what is written there is not what is read; what answers is no storage")
    probe.remove()
