"""How long a training will take, from the speed of an earlier run of the same model; never without one."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from raysft.config import Config
from raysft.errors import StorageFailed
from raysft.storage.path import StoragePath
from raysft.storage.retry import retry_for

NEWEST, NEWEST_REMOTE = 50, 5
"""Runs that are looked at, newest first; in an object store each takes a request or two."""
SAME = ("model.path", "model.finetuning", "model.quantization", "data.sequence_length", "data.packing",
        "train.gradient_checkpointing", "scaling.use_gpu", "scaling.threads_per_worker")  # fmt: skip
"""Keys on which the speed depends most."""


@dataclass(frozen=True)
class Speed:
    """Tokens that one worker trained on in a second."""

    run: str
    """The run that was that fast."""
    tokens_per_second: float

    def seconds(self, tokens: int, workers: int) -> float:
        """Return the seconds of a training on so many tokens.

        >>> Speed("a", 500.0).seconds(tokens=60_000, workers=2)
        60.0
        """
        return tokens / (self.tokens_per_second * workers)


def earlier_speed(config: Config) -> Speed | None:
    """Return the speed of the newest run in ``run.storage`` with the same model and settings; None without one."""
    with suppress(OSError, StorageFailed), retry_for(0):
        place = config.run_place.parent
        folders = [(entry.modified, name) for name, entry in place.entries().items() if entry.folder]
        most = NEWEST if place.local else NEWEST_REMOTE
        for _, name in sorted(folders, reverse=True)[:most]:
            if found := _speed_of(place / name, config):
                return found
    return None


def _speed_of(run: StoragePath, config: Config) -> Speed | None:
    try:
        results = json.loads((run / "train_results.json").read_text())
        settings = yaml.safe_load((run / "config.yaml").read_text())
        plan = json.loads((run / "plan.json").read_text())
        wanted = config.model_dump(mode="json")
        if (
            any(_value(settings, key) != _value(wanted, key) for key in SAME)
            or plan["resolved"]["dtype"] != config.dtype
        ):
            return None
        return Speed(run.name, results["train_tokens_per_second"] / plan["resolved"]["workers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, yaml.YAMLError):
        return None  # no run, or one of another version


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings
