"""The longest row that fits, where one row alone needs too much memory: as the config is, and with what makes rows cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raysft.config import Config, with_overrides
from raysft.errors import RequestError, as_override
from raysft.estimate.memory import Memory
from raysft.estimate.remedies import parts_of

STEP = 64
"""Rows are a multiple of it."""
TRIES, NEAR = 6, 0.01
"""Estimates of a search, and the share of the memory that may be left when it ends before."""


@dataclass(frozen=True)
class LongestRow:
    """The longest row with some settings."""

    settings: str
    """What to set; empty for the config as it is."""
    tokens: int
    peak: float
    """Bytes of a worker at its peak, with such a row."""
    whole: bool = False
    """True if it is as long as the rows of the training."""

    def __str__(self) -> str:
        return f"{self.tokens}" + (f" with {self.settings}" if self.settings else "")


def longest_rows(
    config: Config, tokens: int, gpu: bool, workers: int, limit: float, memory_of: Callable[[Config, int], Memory]
) -> Iterator[LongestRow]:
    """Yield the longest row as the config is, and with each setting that makes longer ones fit, on top of those before it.

    Args:
        config: that needs too much.
        tokens: of its rows.
        gpu: True if activations can wait elsewhere.
        workers: their number.
        limit: bytes of a worker.
        memory_of: computes the memory of one row of this many tokens.
    """
    longest = 0

    def peak_of(other: Config) -> Callable[[int], float]:
        return lambda size: memory_of(other, size).peak

    for settings, overrides in _ways(config, gpu, workers):
        try:
            found = _longest(limit, tokens, peak_of(with_overrides(config, overrides)))
        except RequestError:
            continue  # something else in the config, or the model, forbids it
        if found[0] > longest:
            longest = found[0]
            yield LongestRow(settings, *found, whole=longest == tokens)
        if longest == tokens:
            return


def _ways(config: Config, gpu: bool, workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that make rows cheaper, each with those before it, in order of their cost."""
    train, overrides = config.train, dict[str, Any]()
    yield "", {}
    for wanted, key, value in (
        (not train.gradient_checkpointing, "train.gradient_checkpointing", True),
        (train.recompute_layers is not None, "train.recompute_layers", None),
        (gpu and train.offload.activations == "none", "train.offload.activations", "cpu"),
        *((True, "scaling.sequence_parallel", parts) for parts in parts_of(workers, config.scaling.sequence_parallel)),
    ):
        if wanted:
            overrides = {**overrides, key: value}
            yield " and ".join(f"{name}={as_override(given)}" for name, given in overrides.items()), overrides


def _longest(limit: float, tokens: int, peak_of: Callable[[int], float]) -> tuple[int, float]:
    """Return the longest row of up to this many tokens, and its peak; (0, 0) if even the shortest does not fit.

    What a row needs mostly grows evenly with it, or ever faster. Then the line between a row that fits and one that does not lies
    above what is needed: where it crosses the limit, a row fits. The line through two rows that fit lies below, and bounds the
    search. Each candidate is estimated, so a wrong guess only costs a try.

    >>> _longest(1000, 4096, lambda tokens: 100 + tokens)
    (896, 996)
    >>> _longest(1000, 4096, lambda tokens: 100 + tokens * tokens / 1000)[0] in range(832, 949)
    True
    """
    high = (tokens, peak_of(tokens))
    if high[1] <= limit:
        return high
    low = before = (STEP, peak_of(STEP))
    if low[1] > limit:
        return 0, 0.0
    for turn in range(TRIES):
        one, other = (before, low) if turn % 2 and before[0] < low[0] else (low, high)
        slope = (other[1] - one[1]) / (other[0] - one[0]) or 1.0
        middle = min(int(one[0] + (limit - one[1]) / slope) // STEP * STEP, high[0] - STEP)
        if middle <= low[0]:
            break
        found = (middle, peak_of(middle))
        if found[1] <= limit:
            before, low = low, found
        else:
            high = found
        if low[1] > (1 - NEAR) * limit:
            break
    return low
