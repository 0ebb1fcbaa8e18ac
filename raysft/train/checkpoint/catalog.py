"""The checkpoints of a run: which are complete, which is the newest, and which are removed.

A checkpoint is complete when the digests of all its parts exist (see ``parts``). Nothing here reads a tensor, so that a driver
and Ray Train's controller look at checkpoints without importing torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from raysft.storage.path import Entry, StoragePath
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.resume import ResumePoint

DAMAGED = "damaged.json"
"""The file that marks a checkpoint as one that differs from what was written."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint differs from what was written. It is marked, and the workers restart from the one before."""


def complete(checkpoints: StoragePath | Path) -> Iterator[StoragePath]:
    """Yield the complete checkpoints that are not known to be damaged, the newest first."""
    for _, folder in _complete(StoragePath.of(checkpoints)):
        yield folder


def newest(checkpoints: StoragePath | Path) -> ResumePoint | None:
    """Return the newest complete checkpoint: the one that a training run resumes from."""
    return next((ResumePoint(folder, cursor) for cursor, folder in _complete(StoragePath.of(checkpoints))), None)


def folder_name(step: int, attempt: str) -> str:
    """Return the name of a checkpoint's folder; restarted workers never mix their parts with those of an earlier attempt."""
    return f"checkpoint_{step:08d}_{attempt}"


def prune(checkpoints: StoragePath, keep: int | None) -> None:
    """Remove all complete checkpoints but the newest ``keep``, and incomplete ones older than the newest.

    Temporary checkpoints count among the newest, but displace no others: those stay when the temporary ones are removed. With
    None, all others stay, and the newest one if it is temporary.
    """
    found = _complete(checkpoints)
    if not found:
        return
    permanent = [folder for cursor, folder in found if not cursor.temporary][:keep]
    for _, folder in found[1 if keep is None else keep :]:
        if folder not in permanent:
            folder.remove()
    complete_names = {folder.name for _, folder in found}
    for name in checkpoints.entries():
        step = name.removeprefix("checkpoint_").split("_")[0]
        if name not in complete_names and step.isdigit() and int(step) < found[0][0].step:
            (checkpoints / name).remove()


def remove_temporary(checkpoints: StoragePath) -> None:
    """Remove the checkpoints that only protected work until the model was written."""
    temporary = [folder for cursor, folder in _complete(checkpoints) if cursor.temporary]
    for folder in temporary:
        folder.remove()
    if temporary and checkpoints.local and not checkpoints.entries():
        checkpoints.remove()


def _complete(checkpoints: StoragePath) -> list[tuple[Cursor, StoragePath]]:
    """List the complete checkpoints with their cursors, the newest first, from one listing of all files."""
    files: dict[str, dict[str, Entry]] = {}
    for path, entry in checkpoints.walk().items():
        name, _, file = path.partition("/")
        if name.startswith("checkpoint_") and file:
            files.setdefault(name, {})[file] = entry
    found = []
    for name, inside in files.items():
        folder = checkpoints / name
        if cursor := _cursor_if_complete(folder, inside):
            found.append((cursor, folder))
    return sorted(found, key=lambda item: (item[0].step, item[1].name), reverse=True)


def _cursor_if_complete(folder: StoragePath, files: Mapping[str, Entry]) -> Cursor | None:
    """Return the cursor of a checkpoint; None if it is incomplete or known to be damaged."""
    if DAMAGED in files or "cursor.json" not in files:
        return None
    try:
        content = (folder / "cursor.json").read_bytes()
        # The driver and Ray Data use the cursor before all files are checked.
        if (
            json.loads((folder / "part_0.json").read_text())["cursor.json"]["sha256"]
            != hashlib.sha256(content).hexdigest()
        ):
            return None
        cursor = Cursor.parse(content)
        for rank in range(cursor.workers):
            if any(name not in files for name in (f"part_{rank}.json", f"part_{rank}.safetensors", f"state_{rank}.pt")):
                return None
            # In an object store a file exists whole or not at all.
            for name, digest in json.loads((folder / f"part_{rank}.json").read_text()).items() if folder.local else ():
                if files[name].size != digest["bytes"]:
                    return None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # half written
    return cursor
