"""Checkpoints as Ray Tune passes them from trial to trial: the names of checkpoints that lie in run directories.

By itself Tune copies what a trial saves into a folder of the driver, which other nodes may not see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray.tune
from pyarrow.fs import LocalFileSystem


class RunCheckpoint(ray.tune.Checkpoint):
    """A checkpoint in the run directory of a trial."""

    def __init__(self, run: str, step: int | None) -> None:
        """Name a checkpoint.

        Args:
            run: path or URI of the run directory.
            step: its step; None if the trial has not saved one.
        """
        # No file has this name, so that Tune can never remove one.
        super().__init__(f"{run} after step {step}", LocalFileSystem())
        self.run, self.step = run, step


@dataclass(frozen=True)
class Saved:
    """What a trial saved, with the attributes that Tune reads."""

    checkpoint: RunCheckpoint
    metrics: dict[str, Any] = field(default_factory=dict)
