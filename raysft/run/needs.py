"""What a training run needs besides CPUs and GPUs: memory, storage, time. Refuses what cannot fit, and warns about the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.config.scaling import slice_tokens
from raysft.data.prepare import PreparedData
from raysft.errors import RequestError, as_yaml, one_line
from raysft.estimate.duration import Speed, earlier_speed, given_speed
from raysft.estimate.estimate import Place, Training, estimate, place_of
from raysft.estimate.hardware import smallest_node
from raysft.estimate.images_of_rows import ImagesOfRows
from raysft.estimate.measure import Microbatch, surely_small
from raysft.estimate.sizes import amount
from raysft.estimate.storage import (
    Storage,
    check_least_room,
    check_room,
    check_shared,
    late_checkpoint,
    slow_checkpoints,
    storage,
    write_speed,
)
from raysft.models.processor import ProcessorFiles
from raysft.run.inputs import ModelFiles
from raysft.run.plan import Plan
from raysft.storage.local_cache import local_copy
from raysft.telemetry.terminal import duration


def with_needs(
    plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData, nodes: Sequence[Node], table: bool = False
) -> Plan:
    """Add to a plan what the training run needs, as lines and warnings.

    Args:
        plan: of the training.
        config: with the batch size that the data decided.
        files: the model.
        prepared: its data.
        nodes: the cluster's nodes.
        table: always estimate, and show the memory as a table. Otherwise a training on CPUs that is certainly far below the
            memory of its node is not estimated, since that takes seconds the first time.

    Raises:
        RequestError: it certainly does not fit, or a node cannot access the storage.
    """
    check_shared(config, nodes)
    return with_estimate(plan, config, files, prepared, nodes, table)


def with_estimate(
    plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData, nodes: Sequence[Node], table: bool = False
) -> Plan:
    """Like ``with_needs``, but do not check whether all nodes can access the storage."""
    training = _training(plan, config, files, prepared)
    place = place_of(training, nodes, smallest_node(nodes, config.scaling.use_gpu))
    given = given_speed(config)
    weight_bytes = _weight_bytes(files)
    if not table and weight_bytes and _is_small(training, weight_bytes, place):
        check_least_room(config, weight_bytes)
        return replace(plan, needs=tuple(_time_line(config, plan, given)) if given else ())
    speed = given or earlier_speed(config)
    time = tuple(_time_line(config, plan, speed)) if speed or table else ()
    try:
        found = estimate(training, place)
    except RequestError:
        raise
    except Exception as error:  # a model whose code transformers cannot run without weights
        return replace(plan, needs=(f"memory: not estimated ({one_line(error, 120)})", *time))
    setup = training.setup(config)
    written = storage(config, found.sizes, setup, _checkpoints(config, plan))
    check_room(config, written)
    seconds = speed.seconds(plan.tokens, plan.workers) / plan.steps if speed and plan.steps else None
    warnings = (*plan.warnings, *found.warnings, *_storage_warnings(config, written, seconds))
    needs = (*found.lines(table), *_storage_line(written), *time)
    return replace(plan, memory=found.memory.as_dict(), needs=needs, warnings=warnings)


def _training(plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData) -> Training:
    tokens = config.data.sequence_length
    if not config.data.packing:  # a microbatch is as wide as its longest row
        tokens = min(tokens, math.ceil(max(source.longest for source in plan.sources.values()) / 8) * 8)
    rows, micro = prepared.train_rows.row_plan, min(config.micro_batch_size, plan.rows_per_worker)
    share = float((rows.step_loss_tokens / rows.step_rows.clip(1)).max()) / tokens
    tokens = slice_tokens(tokens, plan.sequence_parallel)
    places = plan.workers * -(-plan.rows_per_worker // micro) * micro * tokens
    filled = float(rows.step_tokens.max()) / places
    return Training(
        config,
        files.hf_config,
        files.adapter,
        plan.workers,
        plan.rows_per_worker,
        Microbatch(tokens, min(1.0, share), _images(config, files, prepared, micro)),
        min(1.0, filled),
        files.reference.hf_config if files.reference else None,
    )


def _images(config: Config, files: ModelFiles, prepared: PreparedData, rows: int) -> ImagesOfRows | None:
    load = prepared.train_rows.image_load(rows)
    if load is None:
        return None
    processor = ProcessorFiles.of(local_copy(files.model), config.model.runs_code)
    return ImagesOfRows(processor, load.width, load.height, load.per_row)


def _weight_bytes(files: ModelFiles) -> int:
    """Return the size of the model's weight files; 0 if they are not on this node."""
    folder = Path(local_copy(files.model))
    if not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def _is_small(training: Training, weight_bytes: int, place: Place) -> bool:
    """Return True for a training on CPUs that is certainly far below the memory of its node."""
    if training.config.scaling.use_gpu or place.limit is None or training.reference is not None:
        return False
    if training.microbatch.images is not None:
        return False
    tokens, eager = training.microbatch.tokens, training.config.model.attention == "eager"
    return surely_small(training.hf_config, weight_bytes, tokens, training.rows, place.limit, eager)


def _checkpoints(config: Config, plan: Plan) -> int | None:
    """Return the most checkpoints that exist at a time, ignoring their limit; None if time decides."""
    train = config.train
    by_steps = plan.steps / train.save_every_steps if train.save_every_steps else 0
    by_epochs = plan.epochs / train.save_every_epochs if train.save_every_epochs else 0
    asked = math.ceil(by_steps) + math.ceil(by_epochs)  # including the one at the end
    if train.save_every_minutes is None:
        return asked
    return min(plan.steps, asked + 2) if train.keep_last is None else None  # the newest by time, and the next one


def _storage_line(written: Storage) -> Iterator[str]:
    free = f"; {amount(written.free)} are free" if written.free is not None else ""
    checkpoints = f"{written.kept} checkpoints of {amount(written.checkpoint)} and " if written.kept else ""
    yield f"storage: {checkpoints}{amount(written.model)} for the trained model{free}"


def _storage_warnings(config: Config, written: Storage, step_seconds: float | None) -> Iterator[str]:
    if written.free is not None and written.needed > written.free:
        yield (
            f"run.storage: the run writes up to {amount(written.needed)}, but {config.run_place.parent} has "
            f"{amount(written.free)} free; free some space, or lower train.keep_last={as_yaml(config.train.keep_last)}"
        )
    minutes, speed = config.train.save_every_minutes, write_speed(config, written)
    if minutes and (warning := slow_checkpoints(written, speed, 60 * minutes)):
        yield warning
    if warning := late_checkpoint(step_seconds, written.checkpoint / speed if speed else None):
        yield warning


def _time_line(config: Config, plan: Plan, speed: Speed | None) -> Iterator[str]:
    """Say how long all steps take; evaluations, generation and the start come on top."""
    if speed is None:
        yield (
            f"time: unknown, as no run in {config.run_place.parent} had this model and these settings; to give a speed, set "
            "scaling.worker_tokens_per_second"
        )
        return
    seconds, hours = speed.seconds(plan.tokens, plan.workers), config.train.max_hours
    limit = (
        "; train.max_hours stops it earlier, and the same command resumes it"
        if hours and seconds > 3600 * hours
        else ""
    )
    yield f"time: about {duration(seconds)} for all steps, at {speed}{limit}"
