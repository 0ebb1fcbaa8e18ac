"""Generation during training, in the driver: predict with the model of a step, score it, and tell the workers.

One thread does it, alongside the one that handles the workers' events. Its results go through the mailbox of the training, as
the workers' events do, so that the log has one writer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from raysft.cluster.placement import counted
from raysft.config import Config
from raysft.errors import RunFailed, RunStopped, StorageFailed, one_line
from raysft.run.generation_guard import GenerationGuard
from raysft.run.generation_plan import GenerationPlan
from raysft.stopping import Stopping, StopRequest, current, stoppable
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import GenerationDone, GenerationNotice
from raysft.train.generation_line import EngineAlive, GenerationDue, GenerationState, Status

if TYPE_CHECKING:
    from raysft.generate.engine_pool import Room
    from raysft.generate.signs_of_life import Listener

ROOM_SECONDS = 60.0
"""How long engines wait for room alongside the workers, which keep training."""
LOOK_SECONDS = 1.0
SEND_SECONDS = 10
END_SECONDS = 30.0
"""How long a training run that failed or stopped waits for the thread when it ends."""


class _Forgotten(Exception):
    """The request is no longer to be carried out."""


class StepGenerator:
    """A ``train.generation_line.Generator``."""

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
        """Each with the epoch to which it belongs."""
        self._mailbox: Any = None
        self._lock = threading.Lock()
        self._current: Stopping | None = None
        """Of the request being carried out."""
        self._guarded: tuple[GenerationDue, GenerationGuard] | None = None
        """The request that engines are working on or whose predictions are being scored, and its guard."""
        self._given_up: GenerationDue | None = None
        """A request that hangs and cannot be stopped: none that follows it can be carried out."""
        self._epoch = 0
        """Incremented when all requests so far are to be dropped."""
        self._alone = threading.Event()
        """Set once the workers have ended, so that engines may use the whole cluster."""

    @contextmanager
    def begin(self, mailbox: Any) -> Iterator[None]:
        """Generate during the block; the thread has ended when the block does, unless an engine does not respond."""
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
        """Take a request; one with the ticket of an earlier one says that the workers are waiting for it."""
        if (stuck := self._given_up) is not None:
            self._fail(due, f"skipped, because the generation after step {stuck.step} hangs and cannot be stopped")
        else:
            self._requests.put((due, self._epoch))

    def heard(self, ticket: int) -> None:
        """Note that an engine is working on a request."""
        if (guarded := self._guarded) is not None and guarded[0].ticket == ticket:
            guarded[1].heard()

    def forget(self) -> None:
        """Drop all requests."""
        self._stop(StopRequest("the workers restart"))

    def complete(self) -> None:
        """Return once all requests have ended, one cannot be ended, or the run is asked to stop; the next call continues them."""
        self._alone.set()
        with suppress(RunStopped), current().ending_by_itself():
            while self._requests.unfinished_tasks and current().request is None and self._given_up is None:
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
            except Exception as error:  # no failure here may leave workers waiting
                assert due is not None
                if due is not self._given_up:
                    self._fail(due, one_line(error))
            finally:
                self._given_up = None
                self._requests.task_done()

    def _give_up(self, due: GenerationDue, reason: str) -> None:
        """Release everyone who waits for a request that cannot be ended."""
        self._given_up = due
        self._fail(due, f"generation failed: {reason}, and cannot be stopped")

    @contextmanager
    def _stoppable(self, epoch: int) -> Iterator[None]:
        """Let the block be stopped separately; the run's own stop does not cover this thread."""
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
            results = self._predict(due, room)
        done = GenerationDone(self._record(due.step) | results)
        # A driver with too few CPUs may take longer to receive it; it is still on its way. If no driver receives it, the model
        # of the step stays, and the run makes its predictions when it resumes.
        with suppress(RayError):
            self._mailbox.put(done, SEND_SECONDS)
        self._tell(due, Status.DONE, results=results)

    def _predict(self, due: GenerationDue, room: Room | None) -> dict[str, float]:
        """Predict and score as long as there is progress.

        Raises:
            RunFailed: there was none.
        """
        from raysft.generate.signs_of_life import Listener

        def tell(predictions: int, signs: int) -> None:
            self._tell(due, Status.RUNNING, predictions=predictions, signs=signs)

        hang, give_up = self._config.train.hang_minutes, partial(self._give_up, due)
        with GenerationGuard(current(), hang, tell, give_up) as guard:
            self._guarded = due, guard
            listener = Listener(guard.advanced, guard.scoring, partial(self._mailbox.post, EngineAlive(due.ticket)))
            try:
                return predict_step(self._config, self._directory, due.step, room, listener)
            except RunStopped:
                if guard.reason:
                    raise RunFailed(f"generation failed: {guard.reason}") from None
                raise
            finally:
                self._guarded = None

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
        """Reserve resources for as many engines as fit; None if none fits, or the workers have ended."""
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
        unit = "GPU" if self._config.scaling.use_gpu else "CPU"
        free = ray.available_resources().get(unit, 0.0)
        self._notice(
            due.step,
            f"no engine found room next to the workers for {ROOM_SECONDS:g} s ({counted(free, unit)} free), so training pauses "
            "while it generates",
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
        """Say that there will be no further predictions. Their model is removed; existing predictions stay."""
        if not self._config.train.goes_by_predictions:  # otherwise the training ends, and says so
            self._notice(due.step, f"{reason}; the run continues without them")
        with suppress(StorageFailed):
            self._directory.step_model(due.step).remove()
        self._tell(due, Status.FAILED, failure=reason)

    def _notice(self, step: int, message: str) -> None:
        with suppress(RayError):
            self._mailbox.put(GenerationNotice(step, message), SEND_SECONDS)

    def _tell(self, due: GenerationDue, status: Status, **more: Any) -> None:
        if due is self._given_up and status is not Status.FAILED:
            return  # the workers may be waiting for news of another request
        self._mailbox.tell(GenerationState(due.ticket, status, **more))


def predict_step(
    config: Config,
    directory: RunDirectory,
    step: int,
    room: Room | None = None,
    listener: Listener | None = None,
) -> dict[str, float]:
    """Predict the run's prompts with the model of a step, and write predictions and scores.

    Args:
        config: of the run.
        directory: the run directory, which has the prompts and the model.
        step: optimizer steps of the model.
        room: what the engines may use. Default: the whole cluster.
        listener: is told about progress.

    Returns:
        The numbers of the step's ``predict_results.json``.
    """
    from raysft.generate.batch_inference import Output, generate
    from raysft.generate.metrics import write_step_metrics
    from raysft.generate.signs_of_life import Listener

    output = Output(directory.step_model(step).location, directory.generation(step).predictions)
    rows = generate(config, directory.prompts, [output], progress=False, room=room, listener=listener or Listener())
    return write_step_metrics(directory, step, rows)
