"""The state of a training run, apart from its config, model and data: copied from an engine, and restored in another one.

Any number of workers can resume: fragments are stored by the parameter's name and their offset in it, so they are independent of
the number of workers and of the ZeRO stage.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysft.train.checkpoint.blocks import codes_of, has_blocks, quantize
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.optimizer_state import (
    SETTINGS,
    copied,
    counter,
    counters,
    group_counters,
    is_by_weight,
    kinds_of,
    numbers,
    random_states,
    set_group_counters,
    set_random_states,
    values_of,
)
from raysft.train.checkpoint.parts import Snapshot, check, read_state
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.tensor_io import TensorReader
from raysft.train.checkpoint.zero_shards import Fragment, fragments, owners
from raysft.train.deepspeed_internals import (
    base_optimizer,
    is_cpu_adam,
    loss_scaler,
    replay_cpu_adam,
    sync_model_weights,
)
from raysft.train.optim import go_to_step

WEIGHT = "weight"
"""The kind of a fragment of weights; the others are the optimizer's own names (``exp_avg`` …)."""


@torch.no_grad()
def snapshot(engine: Any, cursor: Cursor, log: Sequence[Any] = ()) -> Snapshot:
    """Copy this worker's part of the state.

    Args:
        engine: the DeepSpeed engine.
        cursor: the training's position.
        log: the latest records of ``trainer_log.jsonl``, in case the driver died before it wrote them.
    """
    optimizer, by_weight = base_optimizer(engine), is_by_weight(engine)
    tensors = {_key(WEIGHT, fragment): _copied(fragment.weight) for fragment in fragments(engine)}
    for kind in kinds_of(engine) if by_weight else ():
        for _, group in itertools.groupby(fragments(engine), key=lambda fragment: id(fragment.owner)):
            mine = list(group)
            if kind in optimizer.state[mine[0].owner]:
                values = values_of(optimizer, mine[0].owner, kind)
                tensors.update((_key(kind, fragment), _copied(fragment.of(values))) for fragment in mine)
    rest = {
        "random": random_states(),
        "optimizer": counters(engine) if by_weight else copied(optimizer.state_dict()),
        "groups": group_counters(optimizer) if by_weight else [],
        "scaler": numbers(loss_scaler(engine)),
        "log": list(log),
        "engine": {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
    }
    if has_blocks(optimizer):
        rest["blocks"] = {"of": _layout(engine), "codes": codes_of(optimizer, owners(engine))}
    return Snapshot(dist.get_rank(), tensors, rest, replace(cursor, workers=dist.get_world_size()))


@torch.no_grad()
def load(engine: Any, lr_scheduler: Any, resume: ResumePoint) -> list[Any]:
    """Restore the state of a training run from a checkpoint that any number of workers wrote.

    The optimizer's settings and the learning rate follow the current config: the rate depends on the step's number alone. Workers
    that did not exist when the checkpoint was written draw their own random numbers (dropout); all else continues unchanged.

    Args:
        engine: a new DeepSpeed engine, of a config that may resume from the checkpoint.
        lr_scheduler: the engine's learning rate scheduler.
        resume: the checkpoint.

    Returns:
        The log records of the checkpoint, of rank 0.

    Raises:
        CorruptCheckpoint: a file differs from what was written.
        RunFailed: the checkpoint belongs to another model.
    """
    folder, cursor, rank = resume.path, resume.cursor, dist.get_rank()
    own = rank if rank < cursor.workers else 0
    optimizer, by_weight = base_optimizer(engine), is_by_weight(engine)
    with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
        local_parts = check(folder, cursor, Path(scratch))
        rest = read_state(folder, local_parts.get(own, folder), own)
        reader = TensorReader({part: local_parts.get(part, folder) for part in range(cursor.workers)}, local_parts)
        kinds = [kind for kind in reader.kinds if kind != WEIGHT and by_weight]
        if by_weight:
            for owner in owners(engine):
                # Numbers that become codes are in CPU memory: the device may have no room for them.
                place = {"device": "cpu", "dtype": torch.float32} if has_blocks(optimizer) else {}
                optimizer.state[owner] = {
                    **{name: counter(value, owner, optimizer) for name, value in rest["optimizer"].items()},
                    **{kind: torch.zeros_like(owner, requires_grad=False, **place) for kind in kinds},
                }
            set_group_counters(optimizer, rest.get("groups", []))
            if is_cpu_adam(optimizer):
                replay_cpu_adam(optimizer, int(rest["optimizer"]["step"]))
        for fragment in fragments(engine, replicated=True):
            reader.want(WEIGHT, fragment.name, fragment.start, fragment.weight)
            for kind in kinds:
                reader.want(kind, fragment.name, fragment.start, fragment.of(optimizer.state[fragment.owner][kind]))
        reader.read()
    if has_blocks(optimizer):
        blocks = rest["blocks"] if rest["blocks"]["of"] == _layout(engine) else {"codes": itertools.repeat(None)}
        for owner, codes in zip(owners(engine), blocks["codes"], strict=False):
            quantize(optimizer, owner, codes)
    sync_model_weights(engine)
    if not by_weight:
        settings = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(rest["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
    go_to_step(lr_scheduler, cursor.step)
    for name, value in rest["engine"].items():
        setattr(engine, name, value)
    scaler = loss_scaler(engine)
    for name, value in rest["scaler"].items() if scaler is not None else ():  # ZeRO 0 in float32 has none
        setattr(scaler, name, value)
    if rank < cursor.workers:
        set_random_states(rest["random"])
    return rest["log"]  # type: ignore[no-any-return]


def _layout(engine: Any) -> list[tuple[str, int, int, int]]:
    """Return which elements of which parameters this worker's optimizer updates, in their order."""
    return [
        (fragment.name, fragment.start, len(fragment.weight), fragment.offset)
        for fragment in fragments(engine, replicated=True)
    ]


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}:{fragment.start}:{fragment.name}"


def _copied(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True).contiguous()
