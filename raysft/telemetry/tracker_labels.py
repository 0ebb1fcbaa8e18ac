"""The names under which trackers show a run: those of the config, then those of a tracker's own variables, then defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from raysft.config import Config

PROJECT = "raysft"
"""Project of W&B, SwanLab and trackio, experiment of MLflow."""


@dataclass(frozen=True)
class Labels:
    """Names of a run, as ``train.tracking`` gives them; what is None is left to the tracker's variables."""

    name: str
    """Of the run itself: the default of ``run_name``."""
    sweep: str | None = None
    """The sweep that the run is a trial of; of a sweep, itself."""
    project: str | None = None
    run_name: str | None = None
    tags: tuple[str, ...] = ()
    group: str | None = None

    @classmethod
    def of(cls, config: Config) -> Labels:
        """Take the names from a config."""
        names = config.train.tracking
        return cls(config.run.name, config.run.sweep, names.project, names.run_name, tuple(names.tags), names.group)

    def shown(self, variable: str | None = None) -> str:
        """Return the name of the run; a trial has its own behind the name that its sweep's trials share.

        >>> Labels("a").shown(), Labels("a").shown("mine"), Labels("lr-1", "a", run_name="b").shown("mine")
        ('a', 'mine', 'b-lr-1')

        Args:
            variable: value of the tracker's own variable.
        """
        shared = self.run_name or variable
        if not shared:
            return self.name
        return f"{shared}-{self.name}" if self.sweep else shared

    @property
    def tag_values(self) -> Mapping[str, str]:
        """Tags as keys and values, where a tracker has such.

        >>> Labels("a", tags=("quick", "team=nlp")).tag_values
        {'quick': 'true', 'team': 'nlp'}
        """
        return {key: value if equals else "true" for key, equals, value in (tag.partition("=") for tag in self.tags)}


def variable(*names: str) -> str | None:
    """Return the value of the first of some environment variables that is set and not empty."""
    return next((value for name in names if (value := os.environ.get(name))), None)
