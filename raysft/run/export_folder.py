"""The folder that a model is exported to: it is written to a hidden folder inside, and moved up once it is complete."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from raysft.errors import NotNow, RequestError, RunFailed, lacks_space, one_line
from raysft.storage.permissions import let_others_read
from raysft.storage.run_directory import MODEL_MARKS

DRAFT = ".unfinished"
"""A hidden folder with what is written so far. One left behind by a process that died does not count."""
UNPUSHED = ".unpushed"
"""A hidden file in an exported folder that is still to be pushed; it names the model, so the same command can continue."""


def holds(output: Path, model: str | None) -> bool:
    """Return True if a folder already holds a whole model, from a push that did not finish.

    Raises:
        RequestError: it is not empty otherwise.
    """
    if output.exists() and (not output.is_dir() or any(path.name != DRAFT for path in output.iterdir())):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if model and json.loads((output / UNPUSHED).read_text(encoding="utf-8"))["model"] == model:
                return True
        raise RequestError(f"--output {output}: is not an empty folder; choose another one")
    return False


def check_outside(output: Path, sources: Sequence[str]) -> None:
    """Refuse a folder inside the model being exported: what is written there would become part of that model."""
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in output.resolve().parents:
            raise RequestError(f"--output {output}: lies inside {source}, which is exported; choose another folder")


@contextmanager
def draft(folder: Path, remedy: str) -> Iterator[Path]:
    """Yield a folder to write a model into; it is put in place when the block succeeds, and nothing is left if it fails.

    Args:
        folder: where the model goes; new or empty.
        remedy: against a full disk.

    Raises:
        RequestError: the folder cannot be created, or another process writes into it.
        RunFailed: the disk is full.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RequestError(f"--output {folder}: cannot be created ({error.strerror}); choose another folder") from None
    unfinished = folder / DRAFT
    try:
        _lock(place, folder)
        holds(folder, None)  # another process may have ended meanwhile
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            yield unfinished
            let_others_read(unfinished)
            _move_up(unfinished)
        except BaseException as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            with suppress(OSError):
                if new:
                    folder.rmdir()
            if lacks_space(error):
                reason = error.strerror if isinstance(error, OSError) else one_line(error)
                raise RunFailed(
                    f"{folder}: the model cannot be written ({reason}); {remedy}, then run the same command again"
                ) from error
            raise
    finally:
        os.close(place)


def _lock(place: int, folder: Path) -> None:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise NotNow(
            f"--output {folder}: another process writes a model there; wait until it has ended, or choose another folder"
        ) from None


def _move_up(unfinished: Path) -> None:
    """Move all files up; those that show that the model is there come last."""
    last = (*MODEL_MARKS, UNPUSHED)
    for path in sorted(unfinished.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
        path.rename(unfinished.parent / path.name)
    unfinished.rmdir()
