"""The position of a training run, in each checkpoint and each record of the log."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from raysft.storage.path import StoragePath

EVALUATION = "what is evaluated"
"""The key of the evaluation sets in a cursor's identity: if they change, the best evaluation so far does not count."""
PREDICTION = "what is predicted"
"""The key of the prompts and of the settings that decide what a model answers: the same for the scores of predictions."""
OUTSIDE = frozenset({EVALUATION, PREDICTION})
"""Keys in a cursor's identity that the weights do not depend on."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    """Optimizer steps done at that evaluation; 0 if none has given a finite value yet."""
    since: int
    """Evaluations since the last improvement."""
    results: dict[str, float]
    """All results after that step, as ``eval_results.json`` and ``predict_results.json`` name them; empty if ``step`` is 0."""
    bar: float = math.inf
    """The value of the last improvement by more than ``early_stopping.threshold``."""
    seen: int = 0
    """Optimizer steps done at the latest evaluation that was compared with it."""
    kept: bool = True
    """True if its model was kept."""
    metric: str = "eval_loss"
    """The result by which it is the best."""
    lowest: bool = True
    """True if it is the lowest value, False if it is the highest."""

    @property
    def value(self) -> float | None:
        """The value by which it is the best; None if no evaluation has given a finite one yet."""
        return self.results.get(self.metric)


@dataclass(frozen=True)
class Cursor:
    """The position of a training run; with the seed and the manifests it determines exactly which rows remain."""

    step: int
    """Optimizer steps done."""
    rows: int
    """Rows consumed, over all workers."""
    tokens: int
    """Tokens in those rows, without padding."""
    identity: dict[str, str]
    """Name → hash of what is trained: the model, each source and the evaluation sets."""
    best: Best | None = None
    workers: int = 1
    """Number of workers that wrote the checkpoint."""
    temporary: bool = False
    """True if it is removed once the model is written, because neither ``save_every_steps`` nor ``save_every_epochs`` asked."""
    unevaluated: bool = False
    """True if the training was stopped after this step and before its evaluation, which comes first when it continues."""

    @classmethod
    def read(cls, folder: StoragePath | Path) -> Cursor:
        """Read the cursor of a checkpoint."""
        return cls.parse((StoragePath.of(folder) / "cursor.json").read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> Cursor:
        """Parse the content of ``cursor.json``."""
        values = json.loads(content)
        best = values.pop("best", None)
        return cls(**values, best=Best(**best) if best else None)
