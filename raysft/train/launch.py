"""Driver's side: start the workers with Ray Train, watch them, and take what they report."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import ray
import ray.data
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch import get_device as torch_device
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysft.cluster.connect import alive_nodes
from raysft.config import Config
from raysft.errors import RequestError, RunFailed, StorageFailed
from raysft.models.onednn import use_onednn
from raysft.storage.retry import retry_for
from raysft.telemetry.events import Evaluation, evaluation_results
from raysft.train import loop
from raysft.train.checkpoint import format
from raysft.train.checkpoint.async_writer import AsyncWriter
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.elastic import workers_of
from raysft.train.finetuning import load_trained
from raysft.train.loop import TrainJob
from raysft.train.loss import TokenLoss
from raysft.train.restarts import Restarts, cause
from raysft.train.step import evaluate as evaluate_set

Watch = Callable[[str, Any], None]
"""Takes (event, content) in the driver, as the first worker emits them."""

KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}
"""What lets a worker on CPUs keep the memory that a step gives back for the next one. Else glibc asks the kernel for each large
tensor's again, page by page: 4.2 million page faults in five steps instead of 0.4, and 6% of the time (SmolLM2, full)."""
STOP_SECONDS = 30
"""How long the driver waits for the workers to let go."""
WAKE_SECONDS = 10
"""How long the driver waits for an event at a time; asking more often takes CPU from the workers on a small machine."""
LAST_EVENT_SECONDS = 60
"""How long the driver waits for the workers' last event after they are done."""


@dataclass(frozen=True)
class _ResumeStep:
    """The step that the newest checkpoint left off at; Ray Train calls it at each start of the workers."""

    job: TrainJob

    def __call__(self) -> int:
        return _first_step(self.job)


class _PlannedDataConfig(ray.train.DataConfig):
    """The training data from a step on for as many workers as there are now."""

    def __init__(self, job: TrainJob) -> None:
        super().__init__()
        self._job = job

    def configure(self, datasets: Any, world_size: int, *others: Any, **options: Any) -> Any:
        """Make the dataset now that the number of workers is known."""
        rows = self._job.train_rows
        made = {name: rows.dataset(first, world_size) for name, first in datasets.items()}
        usual = ray.train.DataConfig(execution_options=rows.execution_options(world_size))
        return usual.configure(made, world_size, *others, **options)


def _first_step(job: TrainJob) -> int:
    cursor = format.cursor_of(job.run.checkpoints)
    return cursor.step if cursor else 0


def train(job: TrainJob, watch: Watch) -> dict[str, dict[str, float]]:
    """Run the training to its end.

    Args:
        job: what to train.
        watch: takes the events of the first worker.

    Returns:
        ``train`` and ``eval`` results.

    Raises:
        RunFailed: the workers failed more than ``train.max_failures`` times.
    """
    results = _fit(job, _train_worker, {"train": _ResumeStep(job)}, watch)
    with suppress(StorageFailed), retry_for(0):
        format.tidy(job.run.checkpoints, job.config.train.keep_last)  # the last one may have been complete late
    return results


def evaluate(job: TrainJob, watch: Watch) -> dict[str, dict[str, float]]:
    """Evaluate the run's trained model on all evaluation sets; returns ``eval`` results."""
    return _fit(job, _evaluate_worker, {}, watch)


def _fit(job: TrainJob, worker: Any, datasets: dict[str, Any], watch: Watch) -> dict[str, dict[str, float]]:
    # Ray Train goes on from whatever it finds under a name, and fails with its storage: it gets a new folder here, in which it
    # keeps next to nothing. Checkpoints are ours.
    with tempfile.TemporaryDirectory(prefix="raysft-train-", ignore_cleanup_errors=True) as folder:
        return _fit_in(folder, job, worker, datasets, watch)


def _fit_in(
    folder: str, job: TrainJob, worker: Any, datasets: dict[str, Any], watch: Watch
) -> dict[str, dict[str, float]]:
    use_gpu = job.config.scaling.use_gpu
    # Events come to this process: they live on its node, and no longer, and cost no CPU share.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    scaling, policy = workers_of(job.config.scaling, job.run, job.train_rows.row_plan.steps, _emitter(queue))
    trainer = _Trainer(
        worker,
        train_loop_config={"job": job, "queue": queue, "threads": _threads(job.config)},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=folder,
            failure_config=ray.train.FailureConfig(
                max_failures=job.config.train.max_failures, controller_failure_limit=3
            ),
            worker_runtime_env={} if use_gpu else {"env_vars": KEEP_MEMORY},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        datasets=datasets,
        dataset_config=_PlannedDataConfig(job),
    )
    trainer.policy = policy
    with _EventPump(queue, watch, trainer.stop) as watching:
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise cause(error) from error
        except RayError:
            if not watching.broken:
                raise
        except KeyboardInterrupt:
            trainer.stop()
            raise
        return watching.last_event()


class _Trainer(TorchTrainer):
    """A trainer that leaves Ctrl-C to whoever called it: Ray's own handler would stay behind and swallow it for good."""

    _controller: Any = None
    policy: Any
    """Decides how many workers there are."""

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        own = {"scaling_policy": self.policy, "failure_policy": Restarts(self.run_config.failure_config)}
        return super()._initialize_and_run_controller(**{**options, **own})

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def stop(self) -> None:
        """Let the workers go; the wait for it is bounded."""
        if self._controller is not None:
            with suppress(RayError):
                ray.get(self._controller.abort.remote(), timeout=STOP_SECONDS)


def _threads(config: Config) -> int:
    """Threads of one worker's computation: its part of a node's cores."""
    if config.scaling.threads_per_worker:
        return config.scaling.threads_per_worker
    largest = max(node.cpus for node in alive_nodes())
    workers = min(config.scaling.most_workers, max(1, int(largest // config.scaling.cpus_per_worker)))
    return max(1, int(largest) // workers)


class _EventPump:
    """Hands events to the watcher while the workers train."""

    def __init__(self, queue: Queue, watch: Watch, stop: Callable[[], None]) -> None:
        self._queue, self._watch, self._stop = queue, watch, stop
        self._abandoned = False
        self.broken: BaseException | None = None
        """What the watcher (a callback, or the log) raised, or a worker before the training began; all are stopped then."""
        self._end: dict[str, Any] | None = None
        self._failure: Exception | None = None
        self._begun = False
        """Whether the workers have loaded the model. Before, they hold nothing that has to be written."""

    def __enter__(self) -> _EventPump:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # Who is interrupted does not wait until all that was told meanwhile is written down.
        self._abandoned = error is KeyboardInterrupt
        self._closing.set()
        with suppress(RayError):
            self._queue.put(("closing", None), timeout=WAKE_SECONDS)
        self._thread.join(timeout=STOP_SECONDS if self._abandoned else LAST_EVENT_SECONDS)
        self._queue.shutdown(force=True)

    def _run(self) -> None:
        while not self._abandoned:
            try:
                event, content = self._queue.get(timeout=WAKE_SECONDS)
            except Empty:
                if self._closing.is_set():
                    return
                continue
            except RayError:
                return
            if event == "closing":
                return
            if event == "failed":
                self._failure = content
                if self._begun:
                    continue  # the others come to the same end
                # It may be this worker's alone (a damaged copy on its node), and the others wait for it in a collective.
                self.broken = content
                self._stop()
                return
            self._begun = event == "setup" or (self._begun and event != "failure")
            if event == "end":
                self._end = content
            try:
                self._watch(event, content)
            except BaseException as error:
                self.broken = error
                self._stop()
                return

    def last_event(self) -> dict[str, dict[str, float]]:
        """The content of ``end``, for which there is a bounded wait."""
        limit = time.monotonic() + LAST_EVENT_SECONDS
        while self._end is None or self.broken is not None:
            if self.broken is not None:
                raise self.broken
            if self._failure is not None:
                raise self._failure
            if time.monotonic() > limit or not self._thread.is_alive():
                raise RunFailed("the workers finished, but their last event (the results) did not arrive")
            time.sleep(0.05)
        return self._end


def _emitter(queue: Queue) -> loop.Emit:
    def emit(event: str, content: Any) -> None:
        try:
            queue.put((event, content), timeout=10)
        except RayError:
            # The training is worth more than its log.
            print(f"event {event} could not be handed over: {content}", flush=True)

    return emit


@contextmanager
def _told(queue: Queue) -> Iterator[None]:
    """Tell the driver what no second try can mend. Raised, it would be tried again, as if a machine had died."""
    try:
        yield
    except (RequestError, RunFailed) as error:
        _emitter(queue)("failed", error)


def _train_worker(settings: dict[str, Any]) -> None:
    try:
        with _told(settings["queue"]):
            _train(settings)
    except format.CorruptCheckpoint as error:
        if ray.train.get_context().get_world_rank() == 0:
            _emitter(settings["queue"])("damaged", str(error))
        raise


def _train(settings: dict[str, Any]) -> None:
    job, emit = settings["job"], _emitter(settings["queue"])
    torch.set_num_threads(settings["threads"])
    workers = ray.train.get_context().get_world_size()
    saver = AsyncWriter(job.run.checkpoints, job.config.train.keep_last, emit)
    first = Cursor.read(saver.resume).step if saver.resume else 0
    shard = cast(Any, ray.train.get_dataset_shard("train"))
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    batches = job.train_rows.batches(tables, workers)
    loop.train(job, batches, first, torch_device(), emit, saver, saver.resume, _notice)
    saver.close()


def _notice() -> str:
    """What Ray says of nodes that are drained. Its public form is a meeting of all workers; theirs is in each step anyway."""
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    until = f" at {time.strftime('%H:%M:%S', time.localtime(info.deadline_ms / 1000))}" if info.deadline_ms else ""
    return f"node {', '.join(name[:8] for name in info.preempted_node_ids)}{until}"


def _evaluate_worker(settings: dict[str, Any]) -> None:
    with _told(settings["queue"]):
        _evaluate(settings)


def _evaluate(settings: dict[str, Any]) -> None:
    from raysft.train.engine import check_model

    job, emit = settings["job"], _emitter(settings["queue"])
    torch.set_num_threads(settings["threads"])
    context, device = ray.train.get_context(), torch_device()
    if device.type == "cpu":
        use_onednn()
    model = TokenLoss(load_trained(job.config, job.run.model)).to(device).eval()
    rank, workers = context.get_world_rank(), context.get_world_size()
    check_model(model, job.config, device)
    evaluations: list[Evaluation] = [
        evaluate_set(model, name, 0, rows.steps(0, rank, workers), job.config.train.micro_batch_size, device)
        for name, rows in job.eval_rows.items()
    ]
    if rank == 0:
        emit("end", {"eval": evaluation_results(evaluations)})
