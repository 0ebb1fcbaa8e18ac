"""The values that a sweep tries: the dimensions of ``tune.space``, their sizes and draws from them. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysft.config import Config
from raysft.config.tune import RANGES
from raysft.errors import RequestError

RESERVED = ("run.name", "run.sweep", "run.storage", "data.cache", "scaling.address", "tune")
"""Keys that the sweep sets itself."""
CHOICE = "choice"
MOST = 10_000
"""Most values of a key, and most trials: each has a config that is made, and checked, before anything starts."""


@dataclass(frozen=True)
class Dimension:
    """The values of one config key."""

    key: str
    """Dotted key."""
    kind: str
    """``choice``, or a kind of range (``raysft.config.tune.RANGES``)."""
    values: Sequence[Any]
    """The choices, or the numbers of the range: [low, high], of ``quniform`` [low, high, q]."""

    @property
    def size(self) -> float:
        """Number of values.

        >>> [Dimension("k", *one).size for one in (("randint", [1, 3]), ("quniform", [0, 1, 0.25]), ("uniform", [0, 1]))]
        [3, 5, inf]
        """
        if self.kind == CHOICE:
            return len(self.values)
        if self.kind in ("randint", "lograndint"):
            return self.values[1] - self.values[0] + 1
        return self._steps + 1 if self.kind == "quniform" else math.inf

    @property
    def _steps(self) -> int:
        low, high, q = self.values
        return math.floor((high - low) / q + 1e-9)  # (0.3 - 0) / 0.1 is 2.9999999999999996

    def probes(self) -> list[Any]:
        """Return values that show whether a config takes all of them: every choice, or both ends and a value between.

        >>> Dimension("k", "uniform", [0, 8]).probes()
        [0, 8, 3.0557]
        """
        if self.kind == CHOICE:
            return list(self.values)
        low, high = self.values[:2]
        if self.kind == "quniform":
            return [self._on_grid(index) for index in (0, self._steps, 1)]
        # A key that takes whole numbers takes 8.0, but nothing between.
        between = (
            [] if self.kind.endswith("randint") else [round(low + 0.38196 * (high - low), 4 - _magnitude(high - low))]
        )
        return [low, high, *between]

    def holds(self, value: Any) -> bool:
        """True if a number is in the range.

        >>> Dimension("k", "quniform", [0, 1, 0.25]).holds(0.75), Dimension("k", "quniform", [0, 1, 0.25]).holds(0.8)
        (True, False)
        """
        low, high = self.values[:2]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        if self.kind == "quniform":
            return abs((steps := (value - low) / self.values[2]) - round(steps)) < 1e-8
        return not self.kind.endswith("randint") or value == int(value)

    def nearest(self, value: Any) -> Any:
        """Return the value of a range that is nearest to a number; a choice stays as it is.

        >>> Dimension("k", "quniform", [0, 1, 0.25]).nearest(0.6), Dimension("k", "randint", [1, 3]).nearest(7.2)
        (0.5, 3)
        """
        if self.kind == CHOICE:
            return value
        low, high = self.values[:2]
        if self.kind == "quniform":
            return self._on_grid(min(self._steps, max(0, round((value - low) / self.values[2]))))
        inside = min(high, max(low, value))
        return round(inside) if self.kind.endswith("randint") else inside

    def draw(self, numbers: random.Random) -> Any:
        """Draw a value."""
        if self.kind == CHOICE:
            return self.values[numbers.randrange(len(self.values))]
        low, high = self.values[:2]
        match self.kind:
            case "uniform":
                return numbers.uniform(low, high)
            case "loguniform":
                return min(high, max(low, math.exp(numbers.uniform(math.log(low), math.log(high)))))
            case "quniform":
                return self._on_grid(numbers.randint(0, self._steps))
            case "randint":
                return numbers.randint(low, high)
        # Each whole number stands for the interval that is rounded to it, as in Optuna.
        drawn = math.exp(numbers.uniform(math.log(low - 0.5), math.log(high + 0.5)))
        return min(high, max(low, round(drawn)))

    def _on_grid(self, index: int) -> float:
        low, _, q = self.values
        return float(f"{low + index * q:.12g}")  # 0.3 rather than 0.30000000000000004


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value))


def dimensions(config: Config) -> list[Dimension]:
    """Return the dimensions of ``tune.space``.

    Raises:
        RequestError: the space is empty, has a key that cannot vary, or does not suit ``tune.search``.
    """
    found = []
    for key, given in config.tune.space.items():
        ((kind, values),) = given.items() if isinstance(given, dict) else [(CHOICE, given)]
        found.append(Dimension(key, kind, values))
    _check_keys(config, [dimension.key for dimension in found])
    _check_search(config, found)
    return found


def _check_keys(config: Config, keys: Sequence[str]) -> None:
    if not keys:
        raise RequestError(
            "tune.space is empty; give keys and values to try, for example {train.learning_rate: [1.0e-4, 3.0e-4]}"
        )
    for key in keys:
        if key in ("run", *RESERVED) or key.partition(".")[0] in RESERVED:
            raise RequestError(f"tune.space: {key} is the same for all trials; remove it from tune.space")
        if key == "run.seed" and config.tune.repeats > 1:
            raise RequestError(
                f"tune.space: run.seed varies with tune.repeats={config.tune.repeats} already; remove one of them"
            )
        if outer := next((other for other in keys if key.startswith(f"{other}.")), None):
            raise RequestError(f"tune.space: {key} is part of {outer}, which is listed too; remove one of them")


def _check_search(config: Config, found: Sequence[Dimension]) -> None:
    tune, size = config.tune, math.prod(dimension.size for dimension in found)
    for dimension in found:
        if dimension.kind == CHOICE and dimension.size > MOST:
            raise RequestError(
                f"tune.space: {dimension.key} has {dimension.size:g} values, but a sweep compares at most {MOST}; give fewer, or a "
                f"range, one of {', '.join(RANGES)}"
            )
    if tune.search == "grid":
        for dimension in found:
            if dimension.kind != CHOICE:
                raise RequestError(
                    f"tune.space: {dimension.key} is a range ({dimension.kind}), but tune.search=grid; list its values, or set "
                    "tune.search=random and tune.num_samples"
                )
        if tune.num_samples is not None:
            raise RequestError(
                f"tune.num_samples={tune.num_samples} has no effect with tune.search=grid, which tries all {size:g} "
                "combinations; remove it, or set tune.search=random"
            )
    elif tune.num_samples is None:
        raise RequestError(f"tune.search={tune.search} needs tune.num_samples, but it is null; set it")
    elif tune.num_samples > size:
        raise RequestError(
            f"tune.num_samples={tune.num_samples} needs as many different configurations, but tune.space has {size:g}; "
            "lower it, or add values"
        )
    trials = (tune.num_samples or size) * tune.repeats
    if trials > MOST:
        raise RequestError(
            f"the sweep has {trials:g} trials, but it can compare at most {MOST}; "
            + (
                "take values out of tune.space, or set tune.search=random"
                if tune.search == "grid"
                else "lower tune.num_samples"
            )
            + (f", or lower tune.repeats={tune.repeats}" if tune.repeats > 1 else "")
        )
