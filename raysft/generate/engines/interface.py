"""The interface of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raysft.data.types import TokenizedMedium
from raysft.errors import RequestError

Media = Sequence[Sequence[TokenizedMedium]]
"""Images of prompts."""


@dataclass(frozen=True)
class Completion:
    """Completion of one prompt."""

    text: str
    tokens: int
    """Number of tokens generated, including the one that ended the turn."""
    cut: int = 0
    """Number of tokens cut from the front of the prompt because the model has too few positions."""
    stop: str = "length"
    """Why it ended: ``eos`` at an end-of-turn token, ``length`` at the token limit, ``time`` after ``generate.max_seconds``,
    ``error`` if it failed."""
    error: str = ""
    """Reason of a failure."""


def failure(error: Exception | str) -> Completion:
    """Build the completion of a prompt that failed."""
    message = str(error) if isinstance(error, RequestError | str) else f"{type(error).__name__}: {error}"
    return Completion("", tokens=0, stop="error", error=f"{' '.join(message.split()):.300}")


class Engine(Protocol):
    """Completes prompts, at most ``generate.batch_size`` at once; created once per process, then called repeatedly."""

    @property
    def steps(self) -> int:
        """A number that changes with each step of a prediction, for other threads, which see by it that there is progress."""
        ...

    def complete(self, ids: Sequence[str], prompts: Sequence[Sequence[int]], media: Media = ()) -> list[Completion]:
        """Complete prompts.

        Args:
            ids: names of the prompts; with the run's seed they determine the sampling.
            prompts: token IDs of each prompt.
            media: images of each prompt; empty if none has any. Only static batches take some.

        Returns:
            One completion per prompt, in order.
        """
        ...
