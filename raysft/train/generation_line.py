"""What workers and driver tell each other about generation during training, and how it reaches the workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

Place = tuple[str, tuple[str, ...]]
"""Ray's id of a worker's node, and its GPUs as ``CUDA_VISIBLE_DEVICES`` names them."""


@dataclass(frozen=True)
class GenerationDue:
    """The first worker's message to the driver: the model of a step is written, and predictions are due."""

    step: int
    ticket: int
    """Distinguishes this request from others for the same step."""
    places: tuple[Place, ...] = ()
    """Where the workers are that wait and leave their devices to the engines; empty while they train."""


class Status(IntEnum):
    """What became of a request."""

    RUNNING = 0
    NO_ROOM = 1
    """The engines find no room alongside the workers, which should wait."""
    DONE = 2
    FAILED = 3


@dataclass(frozen=True)
class GenerationState:
    """The driver's message to the first worker."""

    ticket: int
    status: Status = Status.RUNNING
    predictions: int = 0
    """Number of predictions so far."""
    signs: int = 0
    """Number of signs of life from its engines and its scoring so far."""
    results: dict[str, float] = field(default_factory=dict)
    """Keys of ``predict_results.json``, once it is done."""
    failure: str = ""


@dataclass(frozen=True)
class EngineAlive:
    """An engine's message to the driver: it is loading a model or computing tokens."""

    ticket: int
    """Of the request."""


class Line(Protocol):
    """A worker's connection to the driver's generation; only the first worker's is used to ask and to listen."""

    place: Place

    def ask(self, due: GenerationDue) -> None: ...

    def state(self) -> GenerationState | None: ...

    def wait(self, seconds: float) -> None: ...


class Generator(Protocol):
    """What generates in the driver, as training uses it."""

    def begin(self, mailbox: Any) -> AbstractContextManager[None]:
        """During the block, generate for the workers of a training run, which hear of it through its mailbox."""
        ...

    def take(self, due: GenerationDue) -> None:
        """Take a request."""
        ...

    def heard(self, ticket: int) -> None:
        """Note that an engine is working on a request."""
        ...

    def forget(self) -> None:
        """Drop all requests: the workers restart, and will repeat them. Existing predictions are kept."""
        ...

    def complete(self) -> None:
        """Return once all requests have ended; the workers have."""
        ...


class MailboxLine:
    """The line of a worker of Ray Train."""

    def __init__(self, mailbox: Any, ask: Callable[[Any], None], place: Place, first: bool) -> None:
        """
        Args:
            mailbox: ``Mailbox`` of the training.
            ask: sends a message to the driver.
            place: of this worker.
            first: True for the first worker, which listens.
        """
        self.ask, self.place = ask, place
        self._state: GenerationState | None = None
        self._news = threading.Event()
        if first:
            mailbox.follow(self._hear)

    def _hear(self, state: GenerationState) -> None:
        self._state = state
        self._news.set()

    def state(self) -> GenerationState | None:
        """Return what the driver said last."""
        return self._state

    def wait(self, seconds: float) -> None:
        """Wait for news from the driver."""
        self._news.wait(seconds)
        self._news.clear()
