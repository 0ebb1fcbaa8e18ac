"""How long training will take, from the speed that the config gives or that an earlier run of the same model had."""

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
SAME = ("model.path", "model.finetuning", "model.train_parts", "model.quantization", "data.sequence_length", "data.packing",
        "train.gradient_checkpointing", "train.recompute_layers", "train.offload.activations", "train.compile",
        "scaling.use_gpu", "scaling.threads_per_worker", "scaling.sequence_parallel")  # fmt: skip
"""Keys on which the speed depends most."""


@dataclass(frozen=True)
class Speed:
    """Tokens that one worker trained on in a second."""

    tokens_per_second: float
    run: str | None = None
    """The run that was that fast; None if the config gives the speed."""

    def __str__(self) -> str:
        """For messages.

        >>> print(Speed(1234.5, "a"))
        the 1,234 tokens/s that each worker of a had
        >>> print(Speed(1234.5))
        the 1,234 tokens/s of a worker in scaling.worker_tokens_per_second
        """
        source = (
            f"that each worker of {self.run} had" if self.run else "of a worker in scaling.worker_tokens_per_second"
        )
        return f"the {self.tokens_per_second:,.0f} tokens/s {source}"

    def seconds(self, tokens: int, workers: int) -> float:
        """Return the seconds of training on this many tokens.

        >>> Speed(500.0).seconds(tokens=60_000, workers=2)
        60.0
        """
        return tokens / (self.tokens_per_second * workers)


def given_speed(config: Config) -> Speed | None:
    """Return the speed that the config gives; None if it gives none."""
    given = config.scaling.worker_tokens_per_second
    return None if given is None else Speed(given)


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
        return Speed(results["train_tokens_per_second"] / plan["resolved"]["workers"], run.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, yaml.YAMLError):
        return None  # no run, or one of another version


def _value(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings
