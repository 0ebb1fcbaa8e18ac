"""Where the configurations of a sweep come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from raysft.tune.trials import Trial


class Source(Protocol):
    """Where configurations come from."""

    trials: list[Trial]
    """The first trial of each configuration that there is so far."""

    def next(self) -> Trial | None:
        """Return the first trial of the next configuration; None after the last one."""
        ...

    def tell(self, configuration: str, values: tuple[float, ...] | None) -> None:
        """Take a configuration's mean metrics; None if it has none."""
        ...


class FixedList:
    """The configurations of a grid or of a random search."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self.trials = list(trials)
        self._next = iter(self.trials)

    def next(self) -> Trial | None:
        """Return the next trial of the list."""
        return next(self._next, None)

    def tell(self, configuration: str, values: tuple[float, ...] | None) -> None:
        """Do nothing: the list does not depend on results."""
