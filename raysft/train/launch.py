"""The driver's side of training or evaluation: start workers with Ray Train, handle their events, and return the results."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from typing import Any

import ray
import ray.data
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from raysft.cluster.connect import alive_nodes
from raysft.cluster.placement import Workers, workers_on_a_node
from raysft.cluster.workers import are_forks
from raysft.config import Config
from raysft.environment import environment
from raysft.errors import RunFailed, RunStopped, StorageFailed, one_line
from raysft.stopping import current
from raysft.storage.retry import retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.events import Emit, TrainingEnded
from raysft.train.checkpoint import catalog
from raysft.train.controller import Controller
from raysft.train.cpu_worker import KEEP_MEMORY
from raysft.train.dataset_config import PlannedDataConfig, Resumption
from raysft.train.elastic import workers_of
from raysft.train.event_pump import EventPump, emitter
from raysft.train.generation_line import Generator
from raysft.train.job import COLLECTIVE_SECONDS, EvaluationJob, TrainJob
from raysft.train.mailbox import Mailbox
from raysft.train.process_group import RestartableTorchConfig
from raysft.train.ray_train_internals import PlacementGroupCleanerCallback
from raysft.train.restarts import Restarts, cause
from raysft.train.worker import evaluate_worker, train_worker

NOTICE = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
"""Ray Train's controller checks every second for worker nodes that are drained: a spot machine may disappear after 15 seconds."""
SHORT_STEPS = 200
SHORT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""The controller learns that the workers have ended when it polls them, by default every two seconds. In short training that is
a good part of the time; in long training, polling more often would cost more than it saves (2 ms of CPU each time). With
several workers, it would more often see those that lost a connection before the one that died."""
STARTS_MINUTES = 10
"""How much longer all workers together may be silent than one that hangs: while they start, none reports."""


def train(
    job: TrainJob, handle: Emit, decisions: Queue | None = None, generator: Generator | None = None
) -> dict[str, dict[str, float]]:
    """Run the training to its end.

    Args:
        job: what to train.
        handle: receives the events in this process.
        decisions: of the scheduler; the workers wait for one after each evaluation except the first and the last.
        generator: generates with the models of steps.

    Returns:
        ``train`` and ``eval`` results.

    Raises:
        RunFailed: the workers failed more than ``train.max_failures`` times, or failed with an error that a restart cannot fix.
        RunStopped: the scheduler stopped it, or the run was asked to stop.
    """
    end = _fit(job, train_worker, handle, decisions, generator)
    with suppress(StorageFailed), retry_for(0):
        catalog.prune(job.run.checkpoints, job.config.train.keep_last)  # the last checkpoint may have completed late
    return asdict(end)


def evaluate(job: EvaluationJob, handle: Emit) -> dict[str, dict[str, float]]:
    """Evaluate a model on all evaluation sets; returns ``eval`` results, and raises like ``train``."""
    return asdict(_fit(job, evaluate_worker, handle))


def _fit(
    job: TrainJob | EvaluationJob,
    worker: Any,
    handle: Emit,
    decisions: Queue | None = None,
    generator: Generator | None = None,
) -> TrainingEnded:
    # Ray Train would resume from its own state under the run's name, and fail when its storage fails. We write checkpoints
    # ourselves, so it gets an empty temporary folder.
    with tempfile.TemporaryDirectory(prefix="raysft-train-", ignore_cleanup_errors=True) as folder:
        mailbox, controller = Mailbox(), Controller()
        settings = {"decisions": decisions, "generates": generator is not None}
        trainer = _trainer(job, worker, mailbox, settings, folder)
        trainer.controller = controller
        stopping = current()
        hang, trains = job.config.train.hang_minutes, worker is train_worker
        silent = hang + STARTS_MINUTES if hang and trains else None
        generating = generator.begin(mailbox) if generator is not None else nullcontext()
        with EventPump(mailbox, handle, controller, silent, generator) as pump, generating:
            try:
                of_controller = _controller_settings(job)
                with stopping.ending_by_itself(), stopping.telling(pump.stop), environment(**of_controller):
                    trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise cause(error) from error
            except RayError as error:
                if not pump.broken:
                    failed, remedy = ("evaluation", "") if worker is evaluate_worker else ("training", " to resume")
                    raise RunFailed(f"the {failed} failed: {one_line(error)}; run it again{remedy}") from error
            except KeyboardInterrupt:
                controller.abort()
                raise
            try:
                end = pump.end()
                if generator is not None:
                    generator.complete()
                return end
            except RunStopped as stopped:
                saved = _saved(job.run, pump.stopped_after) if trains else ""
                raise RunStopped(f"{stopped}{saved}") from None


def _controller_settings(job: TrainJob | EvaluationJob) -> dict[str, str]:
    """Return what Ray Train's controller reads from the environment; values already set there win."""
    short = job.config.scaling.most_workers == 1 and job.steps <= SHORT_STEPS
    settings = NOTICE | (SHORT if short else {})
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def _saved(run: RunDirectory, step: int | None) -> str:
    """Say which checkpoint the training continues from, and how long before the machine disappears it was complete."""
    now, request = time.time(), current().request
    if request is None:
        return ""
    with suppress(StorageFailed, OSError), retry_for(0):
        newest = catalog.newest(run.checkpoints)
        if newest is None or newest.cursor.step != step:
            return (
                f"; the newest checkpoint is that of step {newest.cursor.step}"
                if newest
                else "; there is no checkpoint"
            )
        before = f" {request.until - now:.0f} s before the machine is taken away" if request.until is not None else ""
        return f"; checkpoint written{before}"
    return "; the storage of its checkpoints does not respond"


def _trainer(
    job: TrainJob | EvaluationJob, worker: Any, mailbox: Mailbox, settings: dict[str, Any], folder: str
) -> _Trainer:
    use_gpu, emit = job.config.scaling.use_gpu, emitter(mailbox)
    scaling, policy = workers_of(job.config.scaling, job.run, job.steps, emit)
    trainer = _Trainer(
        worker,
        train_loop_config={"job": job, "mailbox": mailbox, "threads": _threads(job.config), **settings},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=job.config.run.name,  # as shown in Ray's own logs and metrics
            storage_path=folder,
            failure_config=ray.train.FailureConfig(
                max_failures=job.config.train.max_failures, controller_failure_limit=3
            ),
            worker_runtime_env={"env_vars": KEEP_MEMORY} if _keeps_nothing(job.config) else {},
        ),
        torch_config=RestartableTorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
        datasets=Resumption(job.run.checkpoints, emit).datasets() if isinstance(job, TrainJob) else {},
        dataset_config=PlannedDataConfig(job) if isinstance(job, TrainJob) else None,
    )
    trainer.scaling_policy = policy
    return trainer


def _keeps_nothing(config: Config) -> bool:
    """Return True if workers cannot keep a step's memory unless they are started with ``KEEP_MEMORY``; pods are (``submit``)."""
    return not (config.scaling.use_gpu or config.cluster.image or are_forks())


class _Trainer(TorchTrainer):
    """A trainer with our scaling and failure policies that leaves Ctrl-C to its caller.

    Ray's own signal handler would stay installed after the training and swallow every later Ctrl-C.
    """

    scaling_policy: Any
    controller: Controller

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        ours = {
            "scaling_policy": self.scaling_policy,
            "failure_policy": Restarts(self.run_config.failure_config),
            "callbacks": [one for one in options["callbacks"] if not isinstance(one, PlacementGroupCleanerCallback)],
        }
        return super()._initialize_and_run_controller(**{**options, **ours})

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller.actor = controller


def _threads(config: Config) -> int:
    """Number of threads per worker: ``scaling.threads_per_worker``, or an equal part of a node's CPUs."""
    if config.scaling.threads_per_worker:
        return config.scaling.threads_per_worker
    scaling, nodes = config.scaling, alive_nodes()
    workers = Workers(scaling.most_workers, scaling.cpus_per_worker, False, scaling.placement == "spread")
    return max(1, int(max(node.cpus for node in nodes)) // workers_on_a_node(nodes, workers))
