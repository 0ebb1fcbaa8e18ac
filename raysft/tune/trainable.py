"""One trial inside Ray Tune: a whole run in a thread, which reports its evaluations and does what the scheduler decides."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft.config import Config, with_overrides
from raysft.errors import RunFailed, RunStopped
from raysft.run.pipeline import run
from raysft.run.stop_sources import asked_at
from raysft.stopping import stoppable
from raysft.storage.lock import Locked, lock_within
from raysft.storage.path import StoragePath
from raysft.telemetry.callback import Callback
from raysft.train.decisions import Decision
from raysft.train.mailbox import Mailbox
from raysft.tune.lineage import adopt
from raysft.tune.run_checkpoint import RunCheckpoint, Saved

STOP_SECONDS = 300
"""How long a trial may take to save a checkpoint, and one that is stopped to let go of its workers."""
POLL_SECONDS = 5.0
INTERRUPTED = "interrupted"
"""The key of a trial's results that says why it stopped before its end, and is to continue when the sweep is started again."""
PERTURBED = "perturbed"
"""The key under which Tune keeps the values that population-based training changes."""


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a sweep share."""

    scheduled: bool
    """True if a scheduler decides on each evaluation."""
    home: str
    """The folder that relative paths in the configs start from."""
    environment: Mapping[str, str]
    """Variables in which trackers find servers and keys; the processes of a cluster have those of the machine that started it."""
    deadline: float | None = None
    """When trainings are to stop, in seconds since 1970."""
    mailbox: Mailbox | None = None
    """Through which the sweep asks them to stop."""
    restarts: bool = False
    """True if a trial that fails starts again within the sweep."""


class Trainable(ray.tune.Trainable):
    """A trial. With a scheduler, its workers wait after each evaluation for what the scheduler decides.

    A stopped trial ends by itself: the workers save a checkpoint and return, and Ray Train lets go of them. Ray Tune alone would
    end this process only, and the workers would keep their CPUs and GPUs until the sweep ends.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Remember the folder that Ray started this process in: Tune changes into its own."""
        self._started_in = os.getcwd()
        super().__init__(*arguments, **options)

    def setup(self, config: dict[str, Any], settings: TrialSettings) -> None:
        """Take what the first ``step`` starts: Tune may restore a checkpoint before."""
        # A job's working directory may have another path on each node.
        os.chdir(settings.home if os.path.isdir(settings.home) else self._started_in)
        os.environ.update(settings.environment)
        self._config, self._changes = Config.model_validate_json(config["config"]), PERTURBED in config
        if self._changes:
            self._config = with_overrides(self._config, config[PERTURBED])
        self._parent: dict[str, Any] | None = None
        """Trial and step of the checkpoint that this one continues from."""
        self._reports: queue.Queue[dict[str, Any] | BaseException] = queue.Queue()
        self._saved: queue.Queue[int] = queue.Queue()
        """Steps of the checkpoints that are complete."""
        self._settings = settings
        self._decisions = _decisions_queue() if settings.scheduled else None
        self._asked: int | None = None
        """Step of the evaluation that waits for a decision."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="run", daemon=True)

    def _run(self) -> None:
        callback = _Reports(self._reports.put, self._saved.put, self._stopping)
        try:
            results = self._results(callback)
            steps = {"step": results["total_steps"]} if "total_steps" in results else {}
            self._reports.put({**results, **steps, "run_name": self._config.run.name, "done": True})
        except BaseException as error:
            self._reports.put(error)

    def _results(self, callback: Callback) -> dict[str, Any]:
        """Run, and return the results.

        Raises:
            RunStopped: the time was over, the sweep is to stop, or this machine goes and no other may take the trial over.
        """
        settings = self._settings
        with stoppable() as stopping, ExitStack() as stack:
            if settings.deadline is not None:
                stack.enter_context(asked_at(stopping, settings.deadline, "its time is over"))
            if settings.mailbox is not None:
                settings.mailbox.listen(stopping.ask)
            try:
                return run(self._config, [callback], self._changes, self._decisions)
            except RunStopped as stopped:
                if settings.restarts and stopping.request is not None and stopping.request.elsewhere:
                    raise RunFailed(str(stopped)) from None
                raise

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation or the end, and return its results."""
        if self._thread.ident is None:
            if self._settings.deadline is not None and time.time() >= self._settings.deadline:
                return {INTERRUPTED: "its time was over before it started", "done": True}
            with _alone(self._config.run_place):
                pass
            self._thread.start()
        self._decide(Decision.GO_ON)
        self._asked = None
        while True:
            try:
                report = self._reports.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue  # every wait inside a run has a bound
            if isinstance(report, RunStopped):
                return {INTERRUPTED: str(report), "done": True}
            if isinstance(report, BaseException):
                raise report
            if not report.get("done"):
                self._asked = report["step"]
            return report | ({"parent": self._parent} if self._parent else {})

    def _decide(self, decision: Decision) -> None:
        if self._asked is not None and self._decisions is not None:
            self._decisions.put((self._asked, int(decision)))

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save a checkpoint of the run after the evaluation that was reported last, and return where it is."""
        place = RunCheckpoint(self._config.run_place.location, self._asked)
        if self._asked is None or self._decisions is None:
            return Saved(place)
        self._decide(Decision.SAVE)
        limit = time.monotonic() + STOP_SECONDS
        while (left := limit - time.monotonic()) > 0 and self._thread.is_alive():
            with suppress(queue.Empty):
                if self._saved.get(timeout=min(left, POLL_SECONDS)) == self._asked:
                    return Saved(place)
        raise RunFailed(f"no checkpoint was saved after step {self._asked}, so no other trial can continue from it")

    def restore(self, checkpoint_path: Any) -> None:
        """Go on from another trial's checkpoint; a trial's own run continues from its newest one by itself.

        Args:
            checkpoint_path: a ``Saved``, or what Tune made of it.
        """
        checkpoint: RunCheckpoint = checkpoint_path.checkpoint
        other = StoragePath.of(checkpoint.run)
        if checkpoint.step is not None and other.location != self._config.run_place.location:
            with _alone(self._config.run_place):
                adopt(self._config.run_place, other, checkpoint.step)
            self._parent = {"trial": other.name, "step": checkpoint.step}

    def cleanup(self) -> None:
        """Stop the run, and return once it has let go of its workers."""
        self._stopping.set()
        self._decide(Decision.STOP)
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)
        if self._decisions is not None:
            self._decisions.shutdown(force=True)


def _decisions_queue() -> Queue:
    """Create the queue of a scheduler's decisions on this node: it lives as long as that node, and reserves no CPU."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


@contextmanager
def _alone(place: StoragePath) -> Iterator[None]:
    """Have a run directory to oneself, once an earlier process of the trial has let go of it: Tune does not wait for its end."""
    try:
        with lock_within(STOP_SECONDS, place, lambda line: None):
            yield
    except Locked as error:
        raise RunFailed(f"{error}; it should have stopped {STOP_SECONDS} s ago") from None


class _Reports(Callback):
    """Hands evaluations over from the thread of the run; ends a run that is to stop and waits for no decision."""

    def __init__(
        self, report: Callable[[dict[str, Any]], None], saved: Callable[[int], None], stopping: threading.Event
    ) -> None:
        self._report, self._saved, self._stopping = report, saved, stopping

    def on_step(self, record: Any) -> None:
        if self._stopping.is_set():
            raise RunStopped(f"stopped after step {record.current_steps}")

    def on_evaluate(self, results: Mapping[str, Any]) -> None:
        step = results["current_steps"]
        # The first concerns no trial, and the last comes with the results of the whole run.
        if 0 < step < results["total_steps"]:
            self._report({**results, "step": step})

    def on_checkpoint(self, cursor: Mapping[str, int]) -> None:
        self._saved(cursor["step"])
