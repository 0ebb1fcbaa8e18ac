"""The functions that each Ray Train worker runs: they connect the loop to Ray's data, checkpoints and events."""

from __future__ import annotations

import socket
import time
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import ray.train
import torch
from ray.train.torch import get_device

from raysft.config import Config
from raysft.errors import RequestError
from raysft.telemetry.events import CheckpointCorrupt, TrainingEnded
from raysft.telemetry.ray_metrics import WorkerMetrics
from raysft.telemetry.results import evaluation_results
from raysft.telemetry.worker_log import named_lines, worker_name
from raysft.train import loop
from raysft.train.checkpoint import catalog
from raysft.train.checkpoint.async_writer import AsyncWriter
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.dataset_config import RESUME, TRAIN
from raysft.train.decisions import Outside, receiver
from raysft.train.evaluation import evaluate
from raysft.train.event_pump import emitter, permanent_failures
from raysft.train.generation_line import MailboxLine, Place
from raysft.train.phases import Phases
from raysft.train.pixels import image_inputs
from raysft.train.ray_train_internals import get_train_context
from raysft.train.sequence_group import SequenceGroup
from raysft.train.step_metrics import worker_values
from raysft.train.stragglers import place
from raysft.train.watchdog import Watchdog


def train_worker(settings: dict[str, Any]) -> None:
    """Train from the newest checkpoint to the end.

    Args:
        settings: ``job`` (``TrainJob``), ``mailbox`` for events and a request to stop, ``decisions`` of a scheduler or None,
            ``generates`` (True if the driver generates with the models of steps), and ``threads``.
    """
    try:
        with _named(settings), permanent_failures(settings["mailbox"]):
            _train(settings)
    except catalog.CorruptCheckpoint as error:
        if ray.train.get_context().get_world_rank() == 0:
            emitter(settings["mailbox"])(CheckpointCorrupt(str(error)))
        raise


def _train(settings: dict[str, Any]) -> None:
    job, mailbox = settings["job"], settings["mailbox"]
    run, rank, device = job.config.run.name, ray.train.get_context().get_world_rank(), get_device()
    emit = emitter(mailbox, worker_name(run, rank, place(device)))
    torch.set_num_threads(settings["threads"])
    check_alone(job.config, ray.train.get_context().get_local_world_size())
    reasons: list[str] = []
    """Why the driver asks to stop; known only to the first worker, from which the others learn it."""
    if rank == 0:
        mailbox.listen(reasons.append)
    decide = receiver(settings["decisions"]) if settings["decisions"] is not None else None
    generation = MailboxLine(mailbox, emit, _place(), first=rank == 0) if settings["generates"] else None
    outside = Outside(_preemption_reason, lambda: reasons[0] if reasons else "", decide, generation)
    workers = ray.train.get_context().get_world_size()
    resume = cast(ResumePoint | None, ray.train.get_dataset_shard(RESUME))
    shard = cast(Any, ray.train.get_dataset_shard(TRAIN))
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    batches = job.train_rows.batches(tables, workers // job.config.scaling.sequence_parallel)
    writer = AsyncWriter(job.run.checkpoints, job.config.train.keep_last, emit)
    phases = Phases()
    watchdog = Watchdog(phases, rank, workers, place(device), job.run.stacks, emit, job.config.train.hang_minutes)
    with watchdog, WorkerMetrics(run, rank, socket.gethostname(), partial(worker_values, phases, device)):
        loop.train(job, batches, device, emit, writer, resume, outside, phases)
        phases.enter("export")
        writer.close()


def check_alone(config: Config, together: int) -> None:
    """Refuse to compute experts alongside another worker on this node, if Ray put both here although there was room elsewhere.

    Args:
        config: the run's config.
        together: number of the run's workers on this node.

    Raises:
        RequestError: there are several, and the config has the node's CPU compute the experts.
    """
    if config.model.experts == "kt" and together > 1:
        raise RequestError(
            f"model.experts=kt needs one worker per node, but {together} are on the same one; use scaling.placement=spread, or "
            "fewer workers (scaling.num_workers)"
        )


def _place() -> Place:
    """Return where this worker is."""
    context = ray.get_runtime_context()
    return context.get_node_id(), tuple(context.get_accelerator_ids().get("GPU", ()))


def _preemption_reason() -> str:
    """Return which nodes Ray is draining, and until when; empty if none.

    Ray's public API for this is a collective call. The loop already shares the answer with the sums of each step.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    until = f" at {time.strftime('%H:%M:%S', time.localtime(info.deadline_ms / 1000))}" if info.deadline_ms else ""
    return f"node {', '.join(name[:8] for name in info.preempted_node_ids)}{until}"


def evaluate_worker(settings: dict[str, Any]) -> None:
    """Evaluate a model on this worker's rows of all evaluation sets.

    Args:
        settings: as for ``train_worker``, but ``job`` is an ``EvaluationJob``.
    """
    with _named(settings), permanent_failures(settings["mailbox"]):
        _evaluate(settings)


def _named(settings: dict[str, Any]) -> AbstractContextManager[None]:
    """Name this worker in its log lines."""
    rank = ray.train.get_context().get_world_rank()
    return named_lines(settings["job"].config.run.name, rank, place(get_device()))


def _evaluate(settings: dict[str, Any]) -> None:
    # DeepSpeed takes seconds to import; the driver imports this module too and does not need it.
    from raysft.train.evaluated_model import evaluated_model

    job, emit = settings["job"], emitter(settings["mailbox"])
    torch.set_num_threads(settings["threads"])
    context, device = ray.train.get_context(), get_device()
    check_alone(job.config, context.get_local_world_size())
    rank, workers = context.get_world_rank(), context.get_world_size()
    processor = job.processor()
    group = SequenceGroup.join(job.config.scaling.sequence_parallel)
    model, rows_at_once = evaluated_model(job, workers, device, processor, group), job.config.micro_batch_size
    images = image_inputs(processor, model.module.model if hasattr(model, "module") else model.model)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.config.autocast):
        evaluations = [
            evaluate(
                model,
                name,
                0,
                rows.steps(0, group.number, group.groups),
                rows_at_once,
                device,
                examples=rows.row_plan.examples,
                images=images,
                source=rows,
                group=group,
            )
            for name, rows in job.eval_rows.items()
        ]
    if rank == 0:
        emit(TrainingEnded({}, evaluation_results(evaluations)))
