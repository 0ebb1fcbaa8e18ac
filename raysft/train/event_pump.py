"""Events on their way from the workers to the driver: a queue, and a thread that handles them while the workers train."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from ray.exceptions import RayError

from raysft.errors import RequestError, RunFailed, RunStopped
from raysft.stopping import StopRequest
from raysft.telemetry.events import (
    CheckpointFailed,
    Emit,
    Event,
    SetupDone,
    TrainingEnded,
    TrainingStopped,
    Waiting,
    WorkersResized,
    WorkersRestarting,
)
from raysft.train.controller import Controller, ControllerStarted
from raysft.train.faults import BadImage
from raysft.train.generation_line import EngineAlive, GenerationDue, Generator
from raysft.train.mailbox import Mailbox

RESUME = "the same command resumes from the newest checkpoint"
SEND_SECONDS = 10
"""How long a worker tries to send an event."""
POLL_SECONDS = 10
"""How long the driver waits for an event at a time; polling more often takes CPU from the workers on a small machine."""
LAST_EVENT_SECONDS = 60
"""How long the driver waits for the workers' last event after they finish."""
INTERRUPT_SECONDS = 30
"""How long the driver waits for the event being handled after Ctrl-C."""


@dataclass(frozen=True)
class PermanentFailure:
    """An error of a worker that a restart cannot fix."""

    error: RequestError | RunFailed
    alone: bool = False
    """True if the other workers do not know of it, and are waiting for this one."""


Message = Event | PermanentFailure | ControllerStarted | GenerationDue | EngineAlive
"""What the workers and the generation engines send to the driver."""


def emitter(mailbox: Mailbox, worker: str = "") -> Callable[[Message], None]:
    """Return a function that sends messages to the driver. It never fails: training matters more than its log.

    Args:
        mailbox: of the training.
        worker: the name of the sending worker, for messages that do not say it themselves.
    """

    def emit(message: Message) -> None:
        if worker and isinstance(message, Waiting | CheckpointFailed):
            message = replace(message, worker=worker)
        _send(mailbox, message)

    return emit


@contextmanager
def permanent_failures(mailbox: Mailbox) -> Iterator[None]:
    """Send ``RequestError`` and ``RunFailed`` to the driver. If they were raised, Ray Train would restart the workers."""
    try:
        yield
    except (RequestError, RunFailed) as error:
        _send(mailbox, PermanentFailure(error, alone=isinstance(error, BadImage)))


def _send(mailbox: Mailbox, message: Message) -> None:
    try:
        mailbox.put(message, timeout=SEND_SECONDS)
    except RayError:
        logging.getLogger(__name__).warning("cannot send event to the driver: %s", message)


class EventPump:
    """Handles events in a thread while the workers train."""

    def __init__(
        self,
        mailbox: Mailbox,
        handle: Emit,
        controller: Controller,
        silent_minutes: float | None = None,
        generator: Generator | None = None,
    ) -> None:
        """
        Args:
            mailbox: where the workers send events, and which carries a request to stop to them.
            handle: handles each event in this process.
            controller: stops the workers when ``handle`` fails; it is given the actor handle.
            silent_minutes: after this long without a message, the workers count as lost. Training workers send signs of life.
                Default: wait forever.
            generator: generates with the models of steps.
        """
        self._generator = generator
        self._silent_minutes, self._heard = silent_minutes, time.monotonic()
        self._mailbox, self._handle, self._controller = mailbox, handle, controller
        self._abandoned = False
        self.broken: BaseException | None = None
        """The error that stopped the workers: raised by ``handle`` (the log or a callback), or by a worker during setup."""
        self._end: TrainingEnded | None = None
        self._failure: RequestError | RunFailed | RunStopped | None = None
        self._set_up = False
        """True once the workers loaded the model. Before that they hold nothing that needs to be written."""
        self._stop: StopRequest | None = None
        self.stopped_after: int | None = None
        """The step after which the workers stopped early."""

    def __enter__(self) -> EventPump:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # After Ctrl-C, events that are still queued are not handled.
        self._abandoned = error is KeyboardInterrupt
        self._closing.set()
        with suppress(RayError):
            self._mailbox.put(None, timeout=SEND_SECONDS)
        self._thread.join(timeout=INTERRUPT_SECONDS if self._abandoned else LAST_EVENT_SECONDS)
        self._mailbox.close()

    def stop(self, request: StopRequest) -> None:
        """Ask the workers to save a checkpoint and end; end them at once if they hold nothing that needs to be written."""
        self._stop = request
        self._mailbox.stop(request.reason)
        if not self._set_up:
            self._break(RunStopped(f"stopped: {request.reason}"))

    def _run(self) -> None:
        while not self._abandoned:
            try:
                message = self._mailbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._closing.is_set():
                    return
                silent = self._silent_minutes
                if silent and time.monotonic() - self._heard > 60 * silent:
                    self._break(RunFailed(f"no heartbeat from the workers for {silent:g} minutes; {RESUME}"))
                    return
                continue
            except RayError:
                return
            if not isinstance(message, EngineAlive):  # which says nothing about the workers
                self._heard = time.monotonic()
            if message is None or not self._take(message):
                return

    def _take(self, message: Message) -> bool:
        """Handle one message. Returns False after the last one."""
        match message:
            case ControllerStarted(actor):
                self._controller.actor = actor
                if self.broken is not None:  # asked to stop before it started
                    self._controller.abort()
                return True
            case PermanentFailure(error, alone):
                self._failure = error
                if self._set_up and not alone:
                    return True  # every worker fails the same way
                # It may concern only this worker (a corrupt copy on its node), while the others wait in a collective.
                return self._break(error)
            case GenerationDue():
                if self._generator is not None:
                    self._generator.take(message)
                return True
            case EngineAlive(ticket):
                if self._generator is not None:
                    self._generator.heard(ticket)
                return True
            case SetupDone():
                self._set_up = True
            case WorkersRestarting():
                self._set_up = False
                if self._generator is not None:
                    self._generator.forget()
                if self._stop is not None:
                    return self._break(
                        RunStopped(f"stopped: {self._stop.reason}, and the workers failed ({message.reason})")
                    )
            case WorkersResized():
                if self._generator is not None:
                    self._generator.forget()
            case TrainingEnded():
                self._end = message
            case TrainingStopped(step, reason, failed=failed):
                self.stopped_after = step
                self._failure = (RunFailed if failed else RunStopped)(f"stopped after step {step}: {reason}")
        try:
            self._handle(message)
        except BaseException as error:
            return self._break(error)
        return True

    def _break(self, error: BaseException) -> bool:
        self.broken = error
        self._controller.abort()
        return False

    def end(self) -> TrainingEnded:
        """Wait a bounded time for the last event.

        Raises:
            RunFailed: it did not arrive; or the error of a worker, the log or a callback.
            RunStopped: the training was stopped early.
        """
        limit = time.monotonic() + LAST_EVENT_SECONDS
        while self._end is None or self.broken is not None:
            if self.broken is not None:
                raise self.broken
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > limit or not self._thread.is_alive():
                raise RunFailed(f"the workers finished, but their results did not reach the driver; {RESUME}")
            time.sleep(0.05)
        self._silent_minutes = None  # the workers are gone; predictions may still be made, for hours
        return self._end
