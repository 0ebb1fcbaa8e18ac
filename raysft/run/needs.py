"""What a training needs beside CPUs and GPUs: memory, storage, time. Refuses what surely cannot fit, and warns about the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.data.prepare import PreparedData
from raysft.errors import RequestError, one_line
from raysft.estimate.duration import Speed, earlier_speed
from raysft.estimate.estimate import Place, Training, estimate, place_of
from raysft.estimate.hardware import smallest_node
from raysft.estimate.measure import Microbatch, surely_small
from raysft.estimate.setup import setup_of
from raysft.estimate.sizes import GIB
from raysft.estimate.storage import (
    Storage,
    check_room,
    check_shared,
    late_checkpoint,
    slow_checkpoints,
    storage,
    write_speed,
)
from raysft.run.inputs import ModelFiles
from raysft.run.plan import Plan
from raysft.storage.local_cache import local_copy
from raysft.telemetry.terminal import duration


def with_needs(
    plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData, nodes: Sequence[Node], table: bool = False
) -> Plan:
    """Add to a plan what the training needs, as lines and warnings.

    Args:
        plan: of the training.
        config: with the batch size that the data decided.
        files: the model.
        prepared: its data.
        nodes: the cluster's nodes.
        table: estimate in any case, and show the memory as a table. Otherwise a training on CPUs that is surely far below the
            memory of its node is not estimated, since that takes seconds the first time.

    Raises:
        RequestError: it surely does not fit, or a node does not see the storage.
    """
    check_shared(config, nodes)
    return with_estimate(plan, config, files, prepared, nodes, table)


def with_estimate(
    plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData, nodes: Sequence[Node], table: bool = False
) -> Plan:
    """Do as ``with_needs``, but do not look whether all nodes see the storage."""
    training = _training(plan, config, files, prepared)
    place = place_of(training, nodes, smallest_node(nodes, config.scaling.use_gpu))
    if not table and _is_small(training, files, place):
        return plan
    try:
        found = estimate(training, place)
    except RequestError:
        raise
    except Exception as error:  # a model whose code transformers cannot run without weights
        return replace(plan, needs=(f"memory: not estimated ({one_line(error, 120)})",))
    written = storage(config, found.sizes, setup_of(config, training.workers, training.rows_per_worker))
    check_room(config, written)
    earlier = earlier_speed(config)
    seconds = earlier.seconds(plan.tokens, plan.workers) / plan.steps if earlier and plan.steps else None
    warnings = (*plan.warnings, *found.warnings, *_storage_warnings(config, written, seconds))
    needs = (*found.lines(table), *_storage_line(written), *_time_line(plan, earlier))
    return replace(plan, memory=found.memory.as_dict(), needs=needs, warnings=warnings)


def _training(plan: Plan, config: Config, files: ModelFiles, prepared: PreparedData) -> Training:
    tokens = config.data.sequence_length
    if not config.data.packing:  # a microbatch is as wide as its longest row
        tokens = min(tokens, math.ceil(max(source.longest for source in plan.sources.values()) / 8) * 8)
    rows, micro = prepared.train_rows.row_plan, min(config.micro_batch_size, plan.rows_per_worker)
    share = float((rows.step_loss_tokens / rows.step_rows.clip(1)).max()) / tokens
    places = plan.workers * -(-plan.rows_per_worker // micro) * micro * tokens
    filled = float(rows.step_tokens.max()) / places
    return Training(
        config,
        files.hf_config,
        files.adapter,
        plan.workers,
        plan.rows_per_worker,
        Microbatch(tokens, min(1.0, share)),
        min(1.0, filled),
    )


def _is_small(training: Training, files: ModelFiles, place: Place) -> bool:
    """Return True for a training on CPUs that is surely far below the memory of its node."""
    folder = Path(local_copy(files.model))
    if training.config.scaling.use_gpu or place.limit is None or not folder.is_dir():
        return False
    weight_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    return surely_small(training.hf_config, weight_bytes, training.microbatch.tokens, training.rows, place.limit)


def _storage_line(written: Storage) -> Iterator[str]:
    free = f"; {written.free / GIB:.1f} GiB are free" if written.free is not None else ""
    checkpoints = f"{written.kept} checkpoints of {written.checkpoint / GIB:.2f} GiB and " if written.kept else ""
    yield f"storage: {checkpoints}{written.model / GIB:.2f} GiB for the trained model{free}"


def _storage_warnings(config: Config, written: Storage, step_seconds: float | None) -> Iterator[str]:
    if written.free is not None and written.needed > written.free:
        yield (
            f"run.storage: the run writes up to {written.needed / GIB:.1f} GiB, but {config.run_place.parent} has "
            f"{written.free / GIB:.1f} GiB free; make room, or lower train.keep_last={config.train.keep_last}"
        )
    minutes, speed = config.train.save_every_minutes, write_speed(config, written)
    if minutes and (warning := slow_checkpoints(written, speed, 60 * minutes)):
        yield warning
    if warning := late_checkpoint(step_seconds, written.checkpoint / speed if speed else None):
        yield warning


def _time_line(plan: Plan, speed: Speed | None) -> Iterator[str]:
    if speed:
        seconds = speed.seconds(plan.tokens, plan.workers)
        yield (
            f"time: about {duration(seconds)} for the steps, at the {speed.tokens_per_second:,.0f} tokens/s that each worker of "
            f"{speed.run} had"
        )
