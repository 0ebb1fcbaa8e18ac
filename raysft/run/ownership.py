"""A run directory belongs to one config, and to one process at a time."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import yaml
from pyarrow import ArrowException

from raysft.config import Config, parse, with_overrides
from raysft.config.resume_effects import Effect, effect_of
from raysft.errors import NotNow, RequestError, StorageFailed, as_yaml, unreadable
from raysft.storage.lock import LockDenied, Locked, lock
from raysft.storage.retry import FIRST_SECONDS, reason_of, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.terminal import Terminal

Changes = Mapping[str, list[Any]]
"""By key: [value that the run has, value requested now]."""
BEFORE_CONFIG = re.compile(r"\.?(\.lock|plan\.json|rejected\.jsonl|changes\.jsonl|config\.yaml)(\.|$)")
"""Names of the files, drafts included, that a run leaves without its config if it ends in its first moments."""
MAX_DESCRIBED = 4
"""Most keys whose values a message lists."""


def with_recorded_batch_size(directory: RunDirectory, config: Config) -> Config:
    """Replace ``train.global_batch_size: auto`` by the number that the run began with, if it has begun."""
    if config.train.global_batch_size != "auto" or not (has_training(directory) and directory.config.exists()):
        return config
    return with_overrides(config, {"train.global_batch_size": recorded_config(directory).train.global_batch_size})


def recorded_commit(directory: RunDirectory, config: Config) -> str | None:
    """Return the commit on the Hub that the run began with, if it has begun and asks for the same model and revision."""
    if not (has_training(directory) and directory.config.exists()):
        return None
    recorded = recorded_config(directory).model
    if (recorded.path, recorded.revision) != (config.model.path, config.model.revision):
        return None
    return _resolved(directory, "model_commit")


def recorded_reference_commit(directory: RunDirectory, config: Config) -> str | None:
    """Return the same for ``train.reference_model``."""
    if not (has_training(directory) and directory.config.exists()):
        return None
    if recorded_config(directory).train.reference_model != config.train.reference_model:
        return None
    return _resolved(directory, "reference_commit")


def _resolved(directory: RunDirectory, name: str) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(directory.plan.read_text(encoding="utf-8"))["resolved"][name]
    return None


def differences(directory: RunDirectory, config: Config) -> Changes:
    """Return the keys that would change the numbers of a training that has begun.

    Raises:
        RequestError: the folder is not a run directory.
    """
    if not directory.config.exists():
        refuse_other_folder(directory)
        return {}
    recorded = recorded_config(directory)
    return changed_keys(recorded, with_recorded_batch_size(directory, config)) if has_training(directory) else {}


def changed_keys(recorded: Config, asked: Config) -> Changes:
    """Return the keys that affect numbers and differ between two configs."""
    before, now = recorded.numerics_keys(), asked.numerics_keys()
    keys = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
    return {key: [before.get(key), now.get(key)] for key in keys}


def refuse_other_folder(directory: RunDirectory) -> None:
    """Refuse a folder with files but without a ``config.yaml``."""
    place = directory.place
    if (place.local and place.local.is_file()) or any(not BEFORE_CONFIG.match(name) for name in place.entries()):
        raise RequestError(f"{place}: is not empty, but contains no config.yaml; choose another run.name")


def recorded_config(directory: RunDirectory) -> Config:
    """Return the config that a run directory records.

    Raises:
        RequestError: it is of another version.
    """
    try:
        return parse(yaml.safe_load(directory.config.read_text(encoding="utf-8")))
    except (TypeError, ValueError, yaml.YAMLError):
        raise RequestError(
            f"{directory.config}: is not a config of this raysft version; choose another run.name"
        ) from None


def has_training(directory: RunDirectory) -> bool:
    """Return True if a training has written to a run directory."""
    return directory.trainer_log.exists() or directory.checkpoints.exists() or directory.model.exists()


def check_ownership(directory: RunDirectory, config: Config, allow_changed: bool | None = False) -> Changes:
    """Refuse a config that would change the numbers of the run in this directory.

    Args:
        directory: the run's directory.
        config: the config that is asked for.
        allow_changed: accept what may change when a run resumes, and anything before the first checkpoint; None for a command
            without such an option.

    Returns:
        The changes that are accepted.

    Raises:
        RequestError: other keys changed; the message names them.
    """
    changes = differences(directory, config)
    if not changes:
        return {}
    fixed = {key: values for key, values in changes.items() if effect_of(key) is Effect.NEVER}
    if not (directory.checkpoints.exists() or directory.model.exists()):
        fixed = {}
    if allow_changed and not fixed:
        return changes
    if fixed:
        remedy = (
            f"{', '.join(fixed)} cannot change once a run has begun: restore the old value, or choose another run.name"
        )
    elif allow_changed is None:
        remedy = "restore the old value, or choose another run.name"
    else:
        remedy = "choose another run.name, or resume with --allow-changed"
    raise RequestError(f"{directory.place}: belongs to another config: {describe_changes(fixed or changes)}; {remedy}")


def refuse_other_kind(directory: RunDirectory, verb: str) -> None:
    """Refuse a run in the directory of a sweep and a sweep in that of a run: each would overwrite the other's config."""
    if verb in ("run", "train", "evaluate", "generate") and directory.trials.exists():
        owner = "a sweep, whose runs are in its trials folder"
    elif verb == "tune" and has_training(directory):
        owner = "a training"
    else:
        return
    raise RequestError(f"{directory.place}: belongs to {owner}; choose another run.name")


def describe_changes(changes: Changes) -> str:
    """Name the changed keys with both values, in one line.

    >>> describe_changes({"train.epochs": [1, 3]})
    'train.epochs=3 (the run has 1)'
    >>> describe_changes({"train.max_steps": [None, 9]})
    'train.max_steps=9 (the run has null)'
    """
    described = [
        f"{key}={as_yaml(asked):.60} (the run has {as_yaml(recorded):.60})"
        for key, (recorded, asked) in changes.items()
    ]
    more = list(changes)[MAX_DESCRIBED:]
    return ", ".join(described[:MAX_DESCRIBED]) + (f" and {len(more)} more: {', '.join(more)}" if more else "")


@contextmanager
def exclusive_access(directory: RunDirectory, terminal: Terminal) -> Iterator[None]:
    """Lock a run directory against other processes; remove it afterwards if it is empty."""
    try:
        with lock(directory.place, terminal.line):
            yield
    except Locked as error:
        kind = RequestError if isinstance(error, LockDenied) else NotNow
        raise kind(f"{error}; wait for it, stop it, or choose another run.name") from None
    finally:
        with suppress(OSError):
            directory.path.rmdir()  # fails if the folder is not empty


def ensure_writable(config: Config) -> None:
    """Create the folders that a run writes to.

    Raises:
        RequestError: one of them cannot be created or written to.
    """
    for key, folder in (("run.storage", config.run_place.parent), ("data.cache", config.cache_directory)):
        try:
            with retry_for(FIRST_SECONDS):
                folder.ensure_writable()
        except (StorageFailed, ArrowException) as error:
            raise unreadable(f"{key}: {reason_of(error)}; check the path and its credentials", error) from None
        except OSError as error:
            if not folder.local:
                raise RequestError(f"{key}: {folder}: {reason_of(error)}; check the path and its credentials") from None
            raise RequestError(f"{key}: {folder} cannot be created ({error.strerror}); choose another folder") from None


def refuse_read_only(config: Config) -> None:
    """Refuse a run directory that exists, or whose parent does, but that cannot be written to.

    Raises:
        RequestError: says why.
    """
    run = config.run_place.local
    if run is None:
        return
    folder = run if run.is_dir() else run.parent
    if not folder.is_dir():
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(
            f"run.storage: {folder} cannot be written to ({error.strerror}); choose another folder"
        ) from None
