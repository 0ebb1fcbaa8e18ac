"""The checkpoint that a training run resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raysft.storage.path import StoragePath
from raysft.train.checkpoint.cursor import Cursor


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint and its cursor.

    ``catalog.newest`` decides on it once for each start of the workers, in Ray Train's controller. The data and all workers
    get the same value, so that they cannot disagree.
    """

    path: StoragePath
    cursor: Cursor

    @classmethod
    def of(cls, folder: StoragePath | Path) -> ResumePoint:
        """The checkpoint in a folder."""
        path = StoragePath.of(folder)
        return cls(path, Cursor.read(path))
