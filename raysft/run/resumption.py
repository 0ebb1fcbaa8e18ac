"""Decide whether a run can resume, and with which rows, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from raysft.config import Config
from raysft.config.resume_effects import Effect, effect_of
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.errors import RequestError
from raysft.run.ownership import Changes, describe_changes
from raysft.storage.json_files import append_json
from raysft.storage.run_directory import RunDirectory
from raysft.train.checkpoint.catalog import newest
from raysft.train.checkpoint.cursor import OUTSIDE, Best, Cursor
from raysft.train.early_stopping import known_best, not_comparable, should_stop

ROW_PLAN = "row_plan"
"""Key of ``plan.json`` for everything that determines the training rows."""


@dataclass(frozen=True)
class Resumption:
    """Where a run resumes, and what it trains on."""

    cursor: Cursor | None
    """Cursor of the newest checkpoint; None if the run starts from the beginning, or is already trained."""
    rows: PackedDataset
    """Rows to train on."""
    recorded_rows: PackedDataset
    """Rows for ``plan.json``: those that a finished run was trained on, else ``rows``."""
    changes: Changes
    from_epoch: int = 0
    """First epoch with other data; 0 if the data is the same."""

    def best(self, config: Config, identity: Mapping[str, str]) -> Best | None:
        """The best evaluation so far, if training continues and compares against it."""
        return known_best(config.train, self.cursor, identity) if self.cursor else None

    def forgotten_best(self, config: Config, identity: Mapping[str, str]) -> str:
        """Say that the best evaluation so far no longer counts, and why; empty if it still counts or nothing is compared."""
        best = self.cursor.best if self.cursor else None
        if not (self.cursor and best and best.value is not None and config.train.comparing_key):
            return ""
        if not (reason := not_comparable(config.train, self.cursor, identity)):
            return ""
        return (
            f"the best model so far, that of step {best.step} with {best.metric}={best.value:.6g}, no longer counts, because "
            f"{reason}; the best model is determined afresh from step {self.cursor.step} on"
        )


def check_resumption(
    directory: RunDirectory,
    config: Config,
    rows: PackedDataset,
    identity: Mapping[str, str],
    changes: Changes,
    allow_changed: bool = False,
) -> Resumption:
    """Find out whether and how a run can resume from its newest checkpoint.

    Args:
        directory: the run's directory.
        config: the requested config.
        rows: the rows of a training that starts from the beginning with it.
        identity: hashes of the requested model and data, as ``Cursor`` keeps them.
        changes: changed keys that the run accepts.
        allow_changed: also accept other data.

    Raises:
        RequestError: the run cannot resume with this request.
    """
    trained, recorded = directory.is_done(), _recorded_rows(directory)
    if trained and not changes:
        return Resumption(None, rows, recorded or rows, {})
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        if trained:
            raise RequestError(
                f"{directory.place}: is already trained, but has no checkpoint to resume from (train.save_every_steps keeps "
                f"some); choose another run.name ({describe_changes(changes)})"
            )
        return Resumption(None, rows, rows, changes)
    cursor = checkpoint.cursor
    changed_files = {
        name: [cursor.identity.get(name), identity.get(name)]
        for name in sorted({*cursor.identity, *identity} - OUTSIDE)
        if cursor.identity.get(name) != identity.get(name)
    }
    _refuse_changed_files(directory, changed_files, cursor, recorded, rows, allow_changed)
    from_epoch = 0
    if recorded is not None and rows.has_same_epochs(recorded):
        rows = replace(rows, earlier=recorded.earlier)
    elif recorded is not None:
        from_epoch = _next_epoch(directory, config, recorded, rows, cursor, {**changes, **changed_files})
        rows = replace(rows, earlier=_first_epochs(recorded, from_epoch - 1))
        changes = {**changes, **changed_files}
    if changes:
        _refuse_without_steps(directory, config, rows.row_plan.steps, identity, changes, cursor, trained)
    return Resumption(cursor, rows, rows, changes, from_epoch)


def _recorded_rows(directory: RunDirectory) -> PackedDataset | None:
    """Rows that ``plan.json`` records; None without a readable one."""
    try:
        recorded = json.loads(directory.plan.read_text(encoding="utf-8")).get(ROW_PLAN)
    except (OSError, ValueError, AttributeError):
        return None
    return PackedDataset.from_dict(recorded) if recorded else None


def _refuse_changed_files(
    directory: RunDirectory,
    changed_files: Changes,
    cursor: Cursor,
    recorded: PackedDataset | None,
    rows: PackedDataset,
    allow_changed: bool,
) -> None:
    """Refuse a model or data whose files have changed under the same name."""
    if recorded is not None and rows.has_same_epochs(recorded):  # an earlier call accepted the data
        changed_files = {name: hashes for name, hashes in changed_files.items() if effect_of(name) is Effect.NEVER}
    if not changed_files:
        return
    fixed = recorded is None or any(effect_of(name) is Effect.NEVER for name in changed_files)
    if allow_changed and not fixed:
        return
    remedies = ["restore the old files", "choose another run.name"]
    if not fixed:
        remedies.append("use the new data from the next epoch on with --allow-changed")
    raise RequestError(
        f"{directory.place}: {' and '.join(changed_files)} changed since this run's checkpoint after step {cursor.step}; "
        f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    )


def _next_epoch(
    directory: RunDirectory,
    config: Config,
    recorded: PackedDataset,
    rows: PackedDataset,
    cursor: Cursor,
    changes: Changes,
) -> int:
    """First epoch with other data; the current epoch finishes with the data it began with, so it has every example once."""
    current = math.ceil(recorded.row_plan.epoch_of(cursor.rows) - 1e-9)
    train = config.train
    if train.max_steps:
        limit, over = "train.max_steps", _first_epochs(recorded, current).row_plan.steps >= train.max_steps
    else:
        limit, over = "train.epochs", current >= train.epochs
    if over and not rows.has_same_epochs(_rows_of_epoch(recorded, current)):
        keys = ", ".join([key for key in changes if effect_of(key) is Effect.EPOCH] or changes)
        raise RequestError(
            f"{directory.place}: {keys} can change from epoch {current + 1} on, but "
            f"{limit}={train.max_steps or train.epochs}; raise {limit}, restore the old data, or choose another run.name"
        )
    return current + 1


def _rows_of_epoch(rows: PackedDataset, epoch: int) -> PackedDataset:
    """Rows of the part of the training to which an epoch belongs."""
    return _rows_of_epoch(rows.earlier, epoch) if rows.earlier is not None and rows.earlier.epochs >= epoch else rows


def _first_epochs(rows: PackedDataset, epochs: int) -> PackedDataset:
    """The same rows, for the first epochs only."""
    if rows.earlier is not None and rows.earlier.epochs >= epochs:
        return _first_epochs(rows.earlier, epochs)
    return replace(rows, epochs=epochs, max_steps=None, repeat=False)


def _refuse_without_steps(
    directory: RunDirectory,
    config: Config,
    steps: int,
    identity: Mapping[str, str],
    changes: Changes,
    cursor: Cursor,
    trained: bool,
) -> None:
    """Refuse changes after which no step is left to train."""
    described, done = describe_changes(changes), cursor.step
    if steps < done or (trained and steps == done):
        raise RequestError(
            f"{directory.place}: the run has done {done} steps, but with {described} it has {steps} in all; "
            "raise train.epochs or train.max_steps, or choose another run.name"
        )
    patience = config.train.early_stopping.patience
    if trained and should_stop(config.train, known_best(config.train, cursor, identity)):
        raise RequestError(
            f"{directory.place}: the last evaluations before step {done} brought no improvement, so early stopping would end "
            f"the run there again ({described}); raise train.early_stopping.patience={patience}, set it to null, or choose "
            "another run.name"
        )


def record_changes(directory: RunDirectory, resumption: Resumption) -> str:
    """Record what changed, and remove the results: the run is no longer done.

    Returns:
        A line about it.
    """
    cursor, changes, epoch = resumption.cursor, resumption.changes, resumption.from_epoch
    record = {"after_step": cursor.step if cursor else 0, "changed": dict(changes)}
    append_json(directory.changes, record | ({"from_epoch": epoch} if epoch else {}))
    for stage in ("train", "eval", "predict", "all"):
        directory.results(stage).unlink(missing_ok=True)
    described = {key: f"{key}={asked!r:.60} (before: {recorded!r:.60})" for key, (recorded, asked) in changes.items()}
    later = [described.pop(key) for key in changes if epoch and effect_of(key) is Effect.EPOCH]
    start = f"resumes after step {cursor.step}" if cursor else "has no checkpoint and starts from the beginning"
    settings = ([f"with {', '.join(described.values())}"] if described else []) + (
        [f"from epoch {epoch} on with {', '.join(later)}"] if later else []
    )
    return f"{directory.place}: {start} {', and '.join(settings)}"
