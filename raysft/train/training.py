"""What the parts of a training loop share: what one worker trains, with what, and whether it ends early."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from raysft.telemetry.events import Emit
from raysft.train.averaging import averaged
from raysft.train.decisions import Outside
from raysft.train.job import RowPlan, TrainJob
from raysft.train.phases import Phases
from raysft.train.pixels import ImageInputs
from raysft.train.sequence_group import ALONE, SequenceGroup


@dataclass
class End:
    """Whether a training run ends before the end of its row plan. The same on all workers."""

    reason: str = ""
    """Why it ends; empty if it continues."""
    failed: bool = False
    """True if it ends because it cannot continue as requested."""

    def fail(self, reason: str) -> None:
        """End because the training cannot continue as requested."""
        self.reason, self.failed = reason, True


@dataclass(frozen=True)
class Training:
    """One worker's training, with its model loaded."""

    job: TrainJob
    engine: Any
    lr_scheduler: Any
    device: torch.device
    emit: Emit
    """Does nothing on workers other than the first."""
    phases: Phases
    outside: Outside
    log: deque[dict[str, Any]]
    """The latest log records, which a checkpoint keeps."""
    first_step: int
    """Optimizer steps done before it started or resumed."""
    end: End
    images: ImageInputs | None = None
    """Makes the pixels of images; None if the data has none."""
    group: SequenceGroup = ALONE
    """The workers that have the same rows as this one."""

    @property
    def row_plan(self) -> RowPlan:
        """The rows of each step."""
        return self.job.train_rows.row_plan

    @property
    def model(self) -> Any:
        """The transformers or peft model inside the engine."""
        return self.engine.module.model

    def stop_as_asked(self) -> None:
        """End because a worker was asked to stop."""
        self.end.reason = self.outside.stop_reason() or "another worker was asked to stop"

    @contextmanager
    def to_export(self) -> Iterator[tuple[Any, Any]]:
        """Yield the current model, with the weights to use, and its tokenizer, to be written in the block. All workers call it."""
        self.phases.enter("export")
        with averaged(self.engine):
            yield self.model, self.job.tokenizer()
