"""Generation during training, in the driver: predict with the model of a step, score it, and tell the workers.

One thread does it, beside the one that handles the workers' events. What it finds out goes through the mailbox of the training, as
the workers' events do, so that the log has one writer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raysft.config import Config
from raysft.errors import RunStopped, StorageFailed, one_line
from raysft.run.generation_plan import GenerationPlan
from raysft.stopping import Stopping, StopRequest, current, stoppable
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import GenerationDone, GenerationNotice
from raysft.train.generation import GenerationDue, GenerationState, Status

if TYPE_CHECKING:
    from raysft.generate.engine_pool import Room

ROOM_SECONDS = 60.0
"""How long engines wait for room beside the workers, which train on meanwhile."""
LOOK_SECONDS = 1.0
SEND_SECONDS = 10
END_SECONDS = 30.0
"""How long the end of a training that failed or stopped waits for the thread."""


class _Forgotten(Exception):
    """The request is not to be carried out any more."""


class StepGenerator:
    """A ``train.generation.Generator``."""

    def __init__(
        self, config: Config, directory: RunDirectory, plan: GenerationPlan, record: Callable[[int], dict[str, Any]]
    ) -> None:
        """
        Args:
            config: of the run.
            directory: the run directory, which has the prompts.
            plan: where the engines run.
            record: returns where the training stands after a step, for the log.
        """
        self._config, self._directory, self._plan, self._record = config, directory, plan, record
        self._requests: queue.Queue[tuple[GenerationDue | None, int]] = queue.Queue()
        """Each with the epoch that it belongs to."""
        self._mailbox: Any = None
        self._lock = threading.Lock()
        self._current: Stopping | None = None
        """Of the request that is carried out."""
        self._epoch = 0
        """Raised when all requests so far are to be forgotten."""
        self._alone = threading.Event()
        """Set once the workers have ended, so that engines may use the whole cluster."""

    @contextmanager
    def begin(self, mailbox: Any) -> Iterator[None]:
        """Generate during the block; at its end the thread is gone, unless an engine does not answer."""
        self._mailbox = mailbox
        thread = threading.Thread(target=self._run, name="generation", daemon=True)
        thread.start()
        try:
            with current().telling(self._stop):
                yield
        finally:
            self.forget()
            self._requests.put((None, 0))
            thread.join(END_SECONDS)

    def take(self, due: GenerationDue) -> None:
        """Take a request; one with the ticket of another says that the workers wait for it."""
        self._requests.put((due, self._epoch))

    def forget(self) -> None:
        """Drop all requests."""
        self._stop(StopRequest("the workers start again"))

    def complete(self) -> None:
        """Return once all requests have ended, or the run is asked to stop; ``complete_generations`` goes on another time."""
        self._alone.set()
        with suppress(RunStopped), current().ending_by_itself():
            while self._requests.unfinished_tasks and current().request is None:
                time.sleep(0.05)

    def _stop(self, request: StopRequest) -> None:
        with self._lock:
            self._epoch += 1
            if self._current is not None:
                self._current.ask(request.reason, request.until, request.elsewhere)

    def _run(self) -> None:
        while True:
            due, epoch = self._requests.get()
            try:
                if due is None:
                    return
                with suppress(_Forgotten, RunStopped), self._stoppable(epoch):
                    self._generate(due)
            except Exception as error:  # whatever fails here must not leave workers waiting
                assert due is not None
                self._fail(due, one_line(error))
            finally:
                self._requests.task_done()

    @contextmanager
    def _stoppable(self, epoch: int) -> Iterator[None]:
        """Make the block something that can be stopped by itself; this thread is no part of the run's own."""
        with stoppable() as stopping:
            with self._lock:
                if epoch != self._epoch:
                    raise _Forgotten
                self._current = stopping
            try:
                yield
            finally:
                with self._lock:
                    self._current = None

    def _generate(self, due: GenerationDue) -> None:
        with self._room(due) as room:
            results = predict_step(
                self._config,
                self._directory,
                due.step,
                room,
                lambda count: self._tell(due, Status.RUNNING, predictions=count),
            )
        self._mailbox.put(GenerationDone(self._record(due.step) | results), SEND_SECONDS)
        self._tell(due, Status.DONE, results=results)

    @contextmanager
    def _room(self, due: GenerationDue) -> Iterator[Room | None]:
        """Yield what the engines may use; None for the whole cluster, once the workers have ended."""
        from raysft.generate.engine_pool import Room

        if not due.places and self._plan.engines and (group := self._reserved()) is not None:
            try:
                if self._config.generate.engine == "vllm":
                    remove_placement_group(group)  # it places its processes itself
                    yield None
                else:
                    yield Room(group, self._plan.threads)
            finally:
                remove_placement_group(group)
            return
        if not due.places and not self._alone.is_set():
            due = self._paused(due)
        yield Room(places=due.places) if due.places else None

    def _reserved(self) -> PlacementGroup | None:
        """Reserve resources for as many engines as find room; None if none does, or the workers have ended."""
        generate = self._config.generate
        bundle = {"GPU": float(generate.gpus_per_engine)} if self._config.scaling.use_gpu else {"CPU": 1.0}
        limit = time.monotonic() + ROOM_SECONDS
        for engines in sorted({self._plan.engines, 1}, reverse=True):
            group = placement_group([bundle] * engines, strategy="SPREAD")
            until = limit if engines == 1 else time.monotonic() + ROOM_SECONDS / 2
            try:
                while time.monotonic() < until and not self._alone.is_set():
                    current().check()
                    if group.wait(LOOK_SECONDS):
                        return group
            except BaseException:
                remove_placement_group(group)
                raise
            remove_placement_group(group)
        return None

    def _paused(self, due: GenerationDue) -> GenerationDue:
        """Ask the workers to wait, and return their answer; the request itself once they have ended."""
        free = ray.available_resources()
        unit = "GPU" if self._config.scaling.use_gpu else "CPU"
        self._notice(
            due.step,
            f"no engine found room beside the workers for {ROOM_SECONDS:g} s ({free.get(unit, 0.0):g} {unit}s are free), so the "
            "training pauses while it generates",
        )
        self._tell(due, Status.NO_ROOM)
        while not self._alone.is_set():
            current().check()
            with suppress(queue.Empty):
                answer, _ = self._requests.get(timeout=LOOK_SECONDS)
                self._requests.task_done()
                if answer is None:
                    raise _Forgotten
                if answer.ticket == due.ticket:
                    return answer
        return due

    def _fail(self, due: GenerationDue, reason: str) -> None:
        """Say that there will be no predictions. Their model goes; those that there are stay."""
        with suppress(RayError, StorageFailed):
            self._notice(due.step, f"{reason}; the training goes on without them")
            self._directory.step_model(due.step).remove()
        self._tell(due, Status.FAILED, failure=reason)

    def _notice(self, step: int, message: str) -> None:
        self._mailbox.put(GenerationNotice(step, message), SEND_SECONDS)

    def _tell(self, due: GenerationDue, status: Status, **more: Any) -> None:
        self._mailbox.tell(GenerationState(due.ticket, status, **more))


def predict_step(
    config: Config,
    directory: RunDirectory,
    step: int,
    room: Room | None = None,
    advanced: Callable[[int], None] = lambda predictions: None,
) -> dict[str, float]:
    """Predict the run's prompts with the model of a step, and write predictions and scores.

    Args:
        config: of the run.
        directory: the run directory, which has the prompts and the model.
        step: optimizer steps of the model.
        room: what the engines may use. Default: the whole cluster.
        advanced: gets the number of predictions so far.

    Returns:
        The numbers of the step's ``predict_results.json``.
    """
    from raysft.generate.batch_inference import Output, generate
    from raysft.generate.metrics import write_step_metrics

    output = Output(directory.step_model(step).location, directory.generation(step).predictions)
    rows = generate(config, directory.prompts, [output], progress=False, room=room, advanced=advanced)
    return write_step_metrics(directory, step, rows)
