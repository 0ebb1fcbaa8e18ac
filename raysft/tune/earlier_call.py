"""What an earlier call of the same sweep has left: which of its trials still count, and which of them still run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import yaml

from raysft.config import Config
from raysft.errors import RequestError
from raysft.storage.lock import Locked, lock_within
from raysft.storage.path import StoragePath
from raysft.tune.ranking import Objectives
from raysft.tune.record import Record, TrialRecord
from raysft.tune.trials import make_trial

RELEASE_SECONDS = 60
"""Longest time that a sweep waits for the processes of trials that were interrupted."""
AT_A_TIME = 16
"""Trials that are looked at at a time."""

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def earlier_trials(config: Config, record: Record) -> dict[str, TrialRecord]:
    """Return the record of an earlier call, where trials whose results do not count for this one are to run again.

    They lack a metric, their run directory was removed, or they generated with other settings. The training of a run that is
    there is not repeated; settings that would change it are refused before.
    """
    objectives = Objectives.of(config.tune)
    found = record.read()
    counts = _all(lambda one: _counts(config, one, objectives), found.values())
    return {
        name: one if counted else replace(one, state="running")
        for (name, one), counted in zip(found.items(), counts, strict=True)
    }


def _counts(config: Config, record: TrialRecord, objectives: Objectives) -> bool:
    if record.state == "done" and any(metric not in record.metrics for metric in objectives.metrics):
        return False
    if not record.ended_well:
        return True  # it runs again in any case
    try:
        asked = make_trial(config, record.values).config
    except RequestError:
        return True  # it is no longer in the space, so that nothing counts it
    had = _config_of(config.run_place / "trials" / record.trial)
    same = not asked.generates or _generation(asked.model_dump(mode="json")) == _generation(had)
    return bool(had) and same


def _config_of(run: StoragePath) -> dict[str, Any]:
    """Return the config of a run directory; empty if there is none."""
    try:
        return yaml.safe_load((run / "config.yaml").read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}


def _generation(config: Mapping[str, Any]) -> Any:
    """Return the settings of generation; its results do not depend on the number of engines, which the sweep sets."""
    return {key: value for key, value in config.get("generate", {}).items() if key != "num_actors"}


def await_release(config: Config, recorded: Mapping[str, TrialRecord], notify: Callable[[str], None]) -> None:
    """Wait for the processes of interrupted trials: those of a driver that was killed take a moment to notice it."""
    limit, told = time.monotonic() + RELEASE_SECONDS, threading.Event()

    def tell(held: Locked) -> None:
        if not told.is_set():
            notify(f"tune: {held}; waiting up to {RELEASE_SECONDS} s for it, as its sweep was interrupted")
        told.set()

    def wait(run: StoragePath) -> None:
        # A trial that is still alive later waits for itself.
        with suppress(Locked):
            if run.exists():
                with lock_within(limit - time.monotonic(), run, notify, tell):
                    pass

    running = [record.trial for record in recorded.values() if record.state == "running"]
    _all(wait, [config.run_place / "trials" / name for name in running])


def _all(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> list[Result]:
    """Call a function with each argument, several at a time: an object store takes a moment for each answer."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(function, arguments))
