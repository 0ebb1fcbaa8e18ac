"""How far a training is, as each checkpoint and each line of the log knows it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from raysft.storage.path import StoragePath

EVALUATION = "what is evaluated"
"""Name of the evaluation sets in a cursor's identity: with others the best evaluation so far says nothing."""


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    """Optimizer steps done when it was made."""
    since: int
    """Evaluations since the last improvement."""
    results: dict[str, float]
    """As ``eval_results.json`` holds them."""
    bar: float = math.inf
    """The loss that was the last improvement by more than ``early_stopping.threshold``."""
    seen: int = 0
    """Optimizer steps done at the last evaluation that it was compared with."""
    kept: bool = True
    """Whether its model was kept."""

    @property
    def loss(self) -> float:
        """By which it is the best."""
        return self.results["eval_loss"]


@dataclass(frozen=True)
class Cursor:
    """How far a training is: with seed and manifest it says exactly what is left."""

    step: int
    """Optimizer steps done."""
    rows: int
    """Rows consumed, over all workers."""
    tokens: int
    """Tokens without padding in them."""
    identity: dict[str, str]
    """What it is a training of: hashes of the model, of each source and of what is evaluated, by name."""
    best: Best | None = None
    workers: int = 1
    """How many wrote the checkpoint."""
    passing: bool = False
    """Whether it is removed once the model is written: ``save_every_steps`` did not ask for it."""

    @classmethod
    def read(cls, folder: StoragePath | Path) -> Cursor:
        """The cursor of a checkpoint."""
        return cls.parse((StoragePath.of(folder) / "cursor.json").read_bytes())

    @classmethod
    def parse(cls, content: bytes) -> Cursor:
        """The cursor in the content of ``cursor.json``."""
        whole = json.loads(content)
        best = whole.pop("best", None)
        return cls(**whole, best=Best(**best) if best else None)
