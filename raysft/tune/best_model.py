"""The best trial's model at its own place, and the end of the other trials' weights (``tune.keep``)."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from raysft.config import Config
from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.tune.ranking import Objectives, Ranked
from raysft.tune.record import TrialRecord
from raysft.tune.results import is_written, rank


def _best_with_model(config: Config, best: Ranked) -> StoragePath | None:
    """Return the model of the best trial of a configuration that has one: those of earlier repeats may have been removed."""
    objectives = Objectives.of(config.tune)
    results = dict(zip(best.trials, best.results, strict=True))
    trials = sorted(results, key=lambda trial: objectives.cost(results[trial]))
    return next((model for trial in trials if (model := _run(config, trial).model).exists()), None)


def provide_model(config: Config, best: Ranked) -> StoragePath | None:
    """Give the best trial's model its own place, ``best_model`` in the sweep's directory, and return where it is.

    With ``tune.keep: all`` it is a link, with ``best`` a copy. In an object store, which has no links, it stays in its run.

    Returns:
        None if no trial of the configuration has a model, because a scheduler stopped them or an earlier call removed it. The
        model of another configuration is not left there then.
    """
    model, place = _best_with_model(config, best), config.run_directory / "best_model"
    if model is None:
        if place.is_symlink() or not is_written(config.run_directory, config, best):
            _remove(place)
        return StoragePath.of(place) if place.exists() else None
    if model.local is None:
        return model
    made = place.with_name(".best_model.partial")
    _remove(made)
    if config.tune.keep == "best":
        shutil.copytree(model.local, made)
    else:
        made.symlink_to(os.path.relpath(model.local, place.parent), target_is_directory=True)
    _remove(place)
    made.rename(place)
    return StoragePath.of(place)


def _remove(place: Path) -> None:
    if place.is_symlink():
        place.unlink()
    with suppress(FileNotFoundError):
        shutil.rmtree(place)


def remove_weights(config: Config, records: Mapping[str, TrialRecord], over: bool = False) -> None:
    """Remove models and checkpoints that ``tune.keep: best`` does not keep.

    A configuration is judged when all its repeats have ended. The best of these is kept, and with several metrics the whole
    Pareto front. So are trials that are to continue. All are kept if the best has nothing left, as an earlier call with another
    metric removed it.

    Args:
        config: the sweep's config.
        records: the record of each trial.
        over: True if no trial is to continue. Before that, population-based training may need every checkpoint.
    """
    if config.tune.keep != "best" or (config.tune.scheduler == "pbt" and not over):
        return
    ended = {name: record for name, record in records.items() if record.ended_well}
    repeats = Counter(record.configuration for record in ended.values())
    judged = {
        name: record for name, record in ended.items() if over or repeats[record.configuration] >= config.tune.repeats
    }
    kept = {trial for one in _kept(rank(config, judged), config) for trial in one.trials}
    with suppress(StorageFailed), retry_for(0):
        if not any(weights.exists() for name in kept for weights in _weights(config, name)):
            return
    for name in judged.keys() - kept:
        for weights in _weights(config, name):
            with suppress(StorageFailed), retry_for(0):
                weights.remove()


def _weights(config: Config, trial: str) -> tuple[StoragePath, StoragePath]:
    run = _run(config, trial)
    return run.model, run.checkpoints


def _kept(ranking: Sequence[Ranked], config: Config) -> list[Ranked]:
    several = len(Objectives.of(config.tune).metrics) > 1
    return [one for place, one in enumerate(ranking) if place == 0 or (several and one.on_front)]


def _run(config: Config, trial: str) -> RunDirectory:
    return RunDirectory.of(config.run_place / "trials" / trial)
