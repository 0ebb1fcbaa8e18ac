"""A trial of population-based training continues from another trial's checkpoint: the files of its run that this changes."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import Any

from raysft.errors import RunFailed
from raysft.storage.path import CHUNK_BYTES, StoragePath
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.cursor import Cursor

LINEAGE = "lineage.jsonl"
"""File of a run directory: whose checkpoints its trial went on from, ``{"trial": NAME, "step": N}`` for each, the oldest first."""


def adopt(run: StoragePath, other: StoragePath, step: int) -> None:
    """Make a run continue from another run's checkpoint: its checkpoints and its log become those of the other run up to there.

    The weights and the optimizer's state have seen the rows that the other run trained on, so its log is the history of this
    run now. Does nothing if the run has gone on from this checkpoint already.

    Args:
        run: run directory that continues.
        other: run directory that has the checkpoint.
        step: step of the checkpoint.

    Raises:
        RunFailed: the checkpoint is gone.
    """
    parent = {"trial": other.name, "step": step}
    parents = read_lineage(run)
    if parents[-1:] == [parent]:
        return
    complete = catalog.complete(other / "checkpoints")
    checkpoint = next((folder for folder in complete if Cursor.read(folder).step == step), None)
    if checkpoint is None:
        raise RunFailed(
            f"{other}: the checkpoint after step {step} no longer exists, so {run.name} cannot continue from it; raise "
            "train.keep_last"
        )
    before = list((run / "checkpoints").entries())
    _copy(checkpoint, run / "checkpoints" / checkpoint.name)
    for name in before:
        if name != checkpoint.name:
            (run / "checkpoints" / name).remove()
    log = [line for line in _lines(other / "trainer_log.jsonl") if line["current_steps"] <= step]
    _write(run / "trainer_log.jsonl", log)
    _write(run / LINEAGE, [*parents, parent])  # last: until then it is done again


def read_lineage(run: StoragePath) -> list[dict[str, Any]]:
    """Return whose checkpoints a run went on from, the oldest first."""
    return _lines(run / LINEAGE)


def _copy(source: StoragePath, target: StoragePath) -> None:
    """Copy a folder file by file, through memory: a node's disk may be smaller than a checkpoint."""

    def copy(file: Any, stream: Any) -> None:
        file.seek(0)
        shutil.copyfileobj(file, stream, CHUNK_BYTES)

    for name in source.walk():
        (source / name).read(lambda file, to=target / name: to.write(lambda stream: copy(file, stream)))


def _lines(path: StoragePath) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; without the last one if it is half written. Empty if there is no file."""
    records = []
    with suppress(FileNotFoundError):
        for line in path.read_text().split("\n"):
            with suppress(ValueError):
                records.append(json.loads(line))
    return records


def _write(path: StoragePath, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
