"""The checkpoints of one worker's training: when they are due, and what is saved with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.triggers import CheckpointTrigger
from raysft.train.early_stopping import EarlyStopper
from raysft.train.training import Training

Save = Callable[[Any, Cursor, list[dict[str, Any]]], None]
"""Saves a checkpoint: (engine, cursor, latest log records)."""


class Checkpoints:
    """Saves checkpoints. All workers call its methods together."""

    def __init__(self, training: Training, save: Save, trigger: CheckpointTrigger, stopper: EarlyStopper) -> None:
        """
        Args:
            training: the one to save.
            save: saves a checkpoint.
            trigger: says when one is due.
            stopper: knows the best model so far, which a checkpoint names.
        """
        self._training, self._save, self._trigger, self._stopper = training, save, trigger, stopper
        self._saved_step = 0

    def save(self, cursor: Cursor) -> None:
        """Save a checkpoint."""
        training = self._training
        training.phases.enter("checkpoint", cursor.step)
        self._save(training.engine, replace(cursor, best=self._stopper.best), list(training.log))
        self._saved_step = cursor.step
        self._trigger.start_clock()

    def save_if_due(self, cursor: Cursor) -> None:
        """Save a checkpoint if one is due after this step and has not been saved yet."""
        if self._trigger.is_due(cursor.step) and self._saved_step != cursor.step:
            self.save(replace(cursor, temporary=not self._trigger.is_scheduled(cursor.step)))

    def is_unsaved(self, cursor: Cursor) -> bool:
        """Return True if a checkpoint would spare repeating steps."""
        resumes = self._training.job.config.train.resumes
        return resumes and cursor.step > self._training.first_step and self._saved_step != cursor.step
