"""What a run goes on from, and whether it can with what changed since it began. Nothing is written before that is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from raysft.config import Config
from raysft.config.resume_effects import Effect, effect_of
from raysft.data.rows.packed_dataset import PackedDataset
from raysft.errors import RequestError
from raysft.run.ownership import Changed, told
from raysft.storage.json_files import append_json
from raysft.storage.run_directory import RunDirectory
from raysft.train.checkpoint.cursor import EVALUATION, Cursor
from raysft.train.checkpoint.format import newest
from raysft.train.early_stopping import known_best, should_stop

SCHEDULE = "schedule"
"""Where ``plan.json`` has all that decides the rows of the training."""


@dataclass(frozen=True)
class Resumption:
    """What a run goes on from, and with what."""

    cursor: Cursor | None
    """Where it goes on; None where it begins anew, or is trained already."""
    rows: PackedDataset
    """What it trains on."""
    scheduled: PackedDataset
    """What it has trained on where it is trained already, else the same."""
    changed: Changed
    from_epoch: int = 0
    """The first epoch of other data."""


def check_resumption(
    directory: RunDirectory,
    config: Config,
    rows: PackedDataset,
    identity: Mapping[str, str],
    changed: Changed,
    allow_changed: bool = False,
) -> Resumption:
    """Find out whether and how a run can go on from its newest checkpoint.

    Args:
        directory: the run's.
        config: what is asked for now.
        rows: of a training that begins with that.
        identity: what the training is of now, as ``Cursor`` has it.
        changed: keys of the config that differ from those that the run was begun with, and may.
        allow_changed: whether the data may be another, too.

    Raises:
        RequestError: it cannot go on like this.
    """
    trained, there = directory.is_done(), _scheduled(directory)
    if trained and not changed:
        return Resumption(None, rows, there or rows, {})
    checkpoint = newest(directory.checkpoints)
    if checkpoint is None:
        if trained:
            raise RequestError(
                f"{directory.place}: is trained and has no checkpoint to go on from (train.save_every_steps leaves some); "
                f"choose another run.name ({told(changed)})"
            )
        return Resumption(None, rows, rows, changed)
    cursor = checkpoint.cursor
    others = {
        name: [cursor.identity.get(name), identity.get(name)]
        for name in sorted({*cursor.identity, *identity} - {EVALUATION})
        if cursor.identity.get(name) != identity.get(name)
    }
    _refuse_others(directory, others, cursor, there, rows, allow_changed)
    from_epoch = 0
    if there is not None and rows.has_same_epochs(there):
        rows = replace(rows, earlier=there.earlier)
    elif there is not None:
        from_epoch = _next_epoch(directory, config, there, rows, cursor, {**changed, **others})
        rows = replace(rows, earlier=_until(there, from_epoch - 1))
        changed = {**changed, **others}
    if changed:
        _refuse_without_steps(directory, config, rows.row_plan.steps, identity, changed, cursor, trained)
    return Resumption(cursor, rows, rows, changed, from_epoch)


def _scheduled(directory: RunDirectory) -> PackedDataset | None:
    """What the run trains on so far; None where nothing tells."""
    try:
        described = json.loads(directory.plan.read_text(encoding="utf-8")).get(SCHEDULE)
    except (OSError, ValueError, AttributeError):
        return None
    return PackedDataset.from_dict(described) if described else None


def _refuse_others(
    directory: RunDirectory,
    others: Changed,
    cursor: Cursor,
    there: PackedDataset | None,
    rows: PackedDataset,
    allow_changed: bool,
) -> None:
    """Refuse files that hold something else under the same name."""
    if there is not None and rows.has_same_epochs(there):  # it was let through before
        others = {name: values for name, values in others.items() if effect_of(name) is Effect.NEVER}
    if not others:
        return
    fixed = there is None or any(effect_of(name) is Effect.NEVER for name in others)
    if allow_changed and not fixed:
        return
    remedy = "" if fixed else "or go on with it from the next epoch on with --allow-changed"
    raise RequestError(
        f"{directory.place}: {' and '.join(others)} changed since this run's checkpoint after step {cursor.step}; "
        f"put it back as it was, {'' if remedy else 'or '}choose another run.name{remedy and ', '}{remedy}"
    )


def _next_epoch(
    directory: RunDirectory, config: Config, there: PackedDataset, rows: PackedDataset, cursor: Cursor, changed: Changed
) -> int:
    """The epoch that other data begins with: what has begun is finished as it was, so that each example keeps its place."""
    begun = math.ceil(there.row_plan.epoch_of(cursor.rows) - 1e-9)
    if begun >= config.train.epochs and not rows.has_same_epochs(_of_epoch(there, begun)):
        what = ", ".join(key for key in changed if effect_of(key) is Effect.EPOCH)
        raise RequestError(
            f"{directory.place}: {what} can change from epoch {begun + 1} on, and train.epochs={config.train.epochs}; "
            "raise train.epochs, put it back as it was, or choose another run.name"
        )
    return begun + 1


def _of_epoch(rows: PackedDataset, epoch: int) -> PackedDataset:
    """The rows that an epoch is made of."""
    return _of_epoch(rows.earlier, epoch) if rows.earlier is not None and rows.earlier.epochs >= epoch else rows


def _until(rows: PackedDataset, epochs: int) -> PackedDataset:
    """The first epochs of some rows."""
    if rows.earlier is not None and rows.earlier.epochs >= epochs:
        return _until(rows.earlier, epochs)
    return replace(rows, epochs=epochs, max_steps=None)


def _refuse_without_steps(
    directory: RunDirectory,
    config: Config,
    steps: int,
    identity: Mapping[str, str],
    changed: Changed,
    cursor: Cursor,
    trained: bool,
) -> None:
    what, done = told(changed), cursor.step
    if steps < done or (trained and steps == done):
        raise RequestError(
            f"{directory.place}: {done} steps are done, and with what is asked for now there are {steps} in all ({what}); "
            "raise train.epochs or train.max_steps, or choose another run.name"
        )
    patience = config.train.early_stopping.patience
    if trained and should_stop(config.train, known_best(config.train, cursor, identity)):
        raise RequestError(
            f"{directory.place}: the last evaluations up to step {done} brought no improvement, and would end the run there "
            f"({what}); raise train.early_stopping.patience={patience}, set it to null, or choose another run.name"
        )


def record_changes(directory: RunDirectory, resumption: Resumption) -> str:
    """Note what a run goes on with, and take its results away: it is not done any more. Gives a line that says so."""
    cursor, changed, epoch = resumption.cursor, resumption.changed, resumption.from_epoch
    after = cursor.step if cursor else 0
    record = {"after_step": after, "changed": dict(changed)} | ({"from_epoch": epoch} if epoch else {})
    append_json(directory.changes, record)
    for stage in ("train", "eval", "predict", "all"):
        directory.results(stage).unlink(missing_ok=True)
    shown = {key: f"{key}={here!r:.60} (before: {there!r:.60})" for key, (there, here) in changed.items()}
    later = [shown.pop(key) for key in changed if epoch and effect_of(key) is Effect.EPOCH]
    where = f"goes on after step {after}" if cursor else "has no checkpoint and begins anew"
    what = ([f"with {', '.join(shown.values())}"] if shown else []) + (
        [f"from epoch {epoch} on with {', '.join(later)}"] if later else []
    )
    return f"{directory.place}: {where} {', and '.join(what)}"
