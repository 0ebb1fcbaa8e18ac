"""What every engine does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raysft.errors import RequestError


@dataclass(frozen=True)
class Completion:
    """What an engine wrote after one prompt."""

    text: str
    tokens: int
    """Tokens generated, the one that ended the turn included."""
    cut: int = 0
    """Tokens taken off the front of the prompt because the model has no more positions."""
    stop: str = "length"
    """Why it ended: ``eos`` at a token that ends a turn, ``length`` at the most tokens, ``time`` after
    ``generate.max_seconds``, ``error`` where it could not be made."""
    error: str = ""
    """What went wrong."""


def failure(error: Exception | str) -> Completion:
    """What stands for a prompt that could not be completed."""
    said = str(error) if isinstance(error, RequestError | str) else f"{type(error).__name__}: {error}"
    return Completion("", tokens=0, stop="error", error=f"{' '.join(said.split()):.300}")


class Engine(Protocol):
    """Completes prompts, at most ``generate.batch_size`` at once; made once in its process, then called with some at a time."""

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """Complete prompts.

        Args:
            ids: names of the prompts; with the seed of the run they decide what is sampled.
            prompts: token ids of each.

        Returns:
            One completion for each prompt, in their order.
        """
        ...
