"""State to go on from: what a training is, apart from its config, its model and its data.

A checkpoint is a folder, local or in an object store. Each worker writes the fragments that it keeps (``part_0.safetensors``), the
rest of its state (``state_0.pt``) and, when both are written, their digests (``part_0.json``); the first worker also writes
``cursor.json``. It is complete when all workers' digests are there. Fragments are kept by the parameter's name and their place in
it, so that any number of workers, under any stage of ZeRO, can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysft.storage.path import Entry, StoragePath
from raysft.train.checkpoint.cursor import Cursor
from raysft.train.checkpoint.optimizer_state import (
    counter,
    counters,
    is_by_weight,
    is_for_each_weight,
    numbers,
    random_states,
    read_rest,
    set_random_states,
)
from raysft.train.checkpoint.resume import ResumePoint
from raysft.train.checkpoint.tensor_io import TensorReader, write_tensors
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
"""Kind of a fragment beside the optimizer's own names (``exp_avg`` …)."""
DAMAGED = "damaged.json"
SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""What an optimizer keeps beside its state and the config decides."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is not what was written; it is marked, and the workers start again from the one before."""


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint in memory, so that the training can go on while it is written."""

    rank: int
    tensors: dict[str, torch.Tensor]
    """By kind, first element and parameter (``exp_avg:0:model.norm.weight``)."""
    rest: dict[str, Any]
    """Random states, the optimizer's counters, the latest records of the log."""
    cursor: Cursor

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@torch.no_grad()
def snapshot(engine: Any, cursor: Cursor, log: Sequence[Any] = ()) -> Snapshot:
    """Copy this worker's part of the state.

    Args:
        engine: the DeepSpeed engine.
        cursor: how far the training is.
        log: the latest records of ``trainer_log.jsonl``: the driver may have died before it wrote them.
    """
    optimizer = base_optimizer(engine)
    tensors = {}
    by_weight = is_by_weight(engine)
    for fragment in fragments(engine):
        tensors[_key(WEIGHT, fragment)] = _copied(fragment.weight)
        for kind, state in optimizer.state[fragment.owner].items() if by_weight else ():
            if is_for_each_weight(state, fragment.owner):
                tensors[_key(kind, fragment)] = _copied(fragment.of(state))
    rest = {
        "random": random_states(),
        "optimizer": counters(engine) if by_weight else optimizer.state_dict(),
        "scaler": numbers(loss_scaler(engine)),
        "log": list(log),
        "engine": {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
    }
    return Snapshot(dist.get_rank(), tensors, rest, replace(cursor, workers=dist.get_world_size()))


def write(part: Snapshot, folder: StoragePath | Path) -> None:
    """Write one worker's part; others write theirs into the same folder."""
    folder = StoragePath.of(folder)
    digests = {}

    def put(name: str, save: Callable[[Any], object]) -> None:
        digests[name] = (folder / name).write(lambda stream: _digested(stream, save))

    put(f"part_{part.rank}.safetensors", lambda stream: write_tensors(part.tensors, stream))
    put(f"state_{part.rank}.pt", lambda stream: torch.save(part.rest, stream))
    if part.rank == 0:
        put("cursor.json", lambda stream: stream.write(json.dumps(asdict(part.cursor)).encode()))
    (folder / f"part_{part.rank}.json").write_text(json.dumps(digests))


def remove_part(part: Snapshot, folder: StoragePath) -> None:
    """Take away what there is of one worker's part, so that a try that failed holds no room."""
    for name in (f"part_{part.rank}.json", f"part_{part.rank}.safetensors", f"state_{part.rank}.pt"):
        (folder / name).remove()
    if folder.local and not folder.entries():
        folder.remove()


def _digested(stream: Any, save: Callable[[Any], object]) -> dict[str, Any]:
    writing = _Digesting(stream)
    save(writing)
    return {"bytes": writing.bytes, "sha256": writing.digest.hexdigest()}


class _Digesting:
    """Counts and digests what is written: it need not be read again, and never lies on a disk on its way to an object store."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.bytes = stream, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self.digest.update(view)
        self.bytes += view.nbytes
        self._stream.write(content)
        return view.nbytes

    def flush(self) -> None:
        """Nothing is held here."""


def complete(checkpoints: StoragePath | Path) -> Iterator[StoragePath]:
    """Checkpoints of which every worker's part is there and none is known to be damaged, the newest first."""
    for _, folder in _complete(StoragePath.of(checkpoints)):
        yield folder


def newest(checkpoints: StoragePath | Path) -> ResumePoint | None:
    """Return the newest complete checkpoint: the one that a training resumes from."""
    return next((ResumePoint(folder, cursor) for cursor, folder in _complete(StoragePath.of(checkpoints))), None)


def folder_name(step: int, attempt: str) -> str:
    """Name of a checkpoint's folder; workers that were started again never mix their parts with those of before."""
    return f"checkpoint_{step:08d}_{attempt}"


def tidy(checkpoints: StoragePath, keep: int) -> None:
    """Remove complete ones beside the newest ``keep``, and what was half written before the newest of them.

    Passing ones count among the newest, but push none of the others out, which stay when the passing ones go.
    """
    found = _complete(checkpoints)
    if not found:
        return
    lasting = [folder for cursor, folder in found if not cursor.passing][:keep]
    for _, folder in found[keep:]:
        if folder not in lasting:
            folder.remove()
    whole = {folder.name for _, folder in found}
    for name in checkpoints.entries():
        step = name.removeprefix("checkpoint_").split("_")[0]
        if name not in whole and step.isdigit() and int(step) < found[0][0].step:
            (checkpoints / name).remove()


def remove_passing(checkpoints: StoragePath) -> None:
    """Remove those that were only to save work until the model is written."""
    found = _complete(checkpoints)
    passing = [folder for cursor, folder in found if cursor.passing]
    for folder in passing:
        folder.remove()
    if passing and checkpoints.local and not checkpoints.entries():
        checkpoints.remove()


def _complete(checkpoints: StoragePath) -> list[tuple[Cursor, StoragePath]]:
    """One listing tells of all of them, however many parts they have."""
    files: dict[str, dict[str, Entry]] = {}
    for path, entry in checkpoints.walk().items():
        name, _, file = path.partition("/")
        if name.startswith("checkpoint_") and file:
            files.setdefault(name, {})[file] = entry
    found = [
        (cursor, checkpoints / name) for name, inside in files.items() if (cursor := _whole(checkpoints / name, inside))
    ]
    return sorted(found, key=lambda each: (each[0].step, each[1].name), reverse=True)


def _whole(folder: StoragePath, files: Mapping[str, Entry]) -> Cursor | None:
    """The cursor of a complete checkpoint."""
    if DAMAGED in files or "cursor.json" not in files:
        return None
    try:
        content = (folder / "cursor.json").read_bytes()
        # Others go by what it says before all files are compared: the driver, and Ray Data, which begins at its step.
        if (
            json.loads((folder / "part_0.json").read_text())["cursor.json"]["sha256"]
            != hashlib.sha256(content).hexdigest()
        ):
            return None
        cursor = Cursor.parse(content)
        for rank in range(cursor.workers):
            if any(name not in files for name in (f"part_{rank}.json", f"part_{rank}.safetensors", f"state_{rank}.pt")):
                return None
            # Elsewhere a file is there as it was written, or not at all; each would have to be asked for its sizes.
            for name, said in json.loads((folder / f"part_{rank}.json").read_text()).items() if folder.local else ():
                if files[name].size != said["bytes"]:
                    return None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # half written
    return cursor


def check(folder: StoragePath, cursor: Cursor, scratch: Path) -> dict[int, StoragePath]:
    """Compare a checkpoint with its digests; each worker reads its share, and all come to the same end.

    Args:
        folder: the checkpoint.
        cursor: its own.
        scratch: a local folder for copies of parts that lie elsewhere.

    Returns:
        By their number where this worker's share of the parts can be read quickly.

    Raises:
        Damaged: a file is not what was written.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    near: dict[int, StoragePath] = {}
    found = None
    for part in range(rank, cursor.workers, workers):
        near[part] = folder if folder.local else StoragePath.of(scratch)
        found = found or _wrong(folder, part, near[part])
    everyones: list[Any] = [None] * workers
    dist.all_gather_object(everyones, found)
    wrong = next((each for each in everyones if each), None)
    if wrong:
        if rank == 0:
            (folder / DAMAGED).write_text(json.dumps({"file": wrong}))
        dist.barrier()
        raise CorruptCheckpoint(f"checkpoint after step {cursor.step}: {folder / wrong} is not what was written")
    return near


def _wrong(folder: StoragePath, part: int, near: StoragePath) -> str | None:
    """A file of a part that differs from its digest; the part is copied to ``near`` if it is not there."""
    for name, said in json.loads((folder / f"part_{part}.json").read_text()).items():
        try:
            if near != folder:
                local = (near / name).local
                assert local
                (folder / name).download(local)
            digest = (near / name).read(lambda file: hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError:
            return str(name)
        if digest != said["sha256"]:
            return str(name)
    return None


@torch.no_grad()
def load(engine: Any, lr_scheduler: Any, resume: ResumePoint) -> list[Any]:
    """Put a training back to where a checkpoint was written, by as many workers or by others.

    The optimizer's settings and the course of the learning rate are those of the config now: the rate of a step follows from
    its number and the config alone.

    With other workers, those that were not there draw random numbers of their own (dropout); all else goes on as it was.

    Args:
        engine: as it was made for a config that may go on from it.
        lr_scheduler: of the learning rate.
        resume: the checkpoint.

    Returns:
        The log records in it, on the first worker.

    Raises:
        Damaged: it is not what was written.
        RunFailed: it is of another model.
    """
    folder, cursor, rank = resume.path, resume.cursor, dist.get_rank()
    own = rank if rank < cursor.workers else 0
    optimizer, by_weight = base_optimizer(engine), is_by_weight(engine)
    with tempfile.TemporaryDirectory(prefix="raysft-") as scratch:
        near = check(folder, cursor, Path(scratch))
        rest = _read_rest(folder, near.get(own, folder), own)
        pieces = TensorReader({part: near.get(part, folder) for part in range(cursor.workers)}, near)
        kinds = [kind for kind in pieces.kinds if kind != WEIGHT and by_weight]
        if by_weight:
            for owner in owners(engine):
                optimizer.state[owner] = {
                    **{name: counter(value, owner, optimizer) for name, value in rest["optimizer"].items()},
                    **{kind: torch.zeros_like(owner, requires_grad=False) for kind in kinds},
                }
            if is_cpu_adam(optimizer):
                replay_cpu_adam(optimizer, int(rest["optimizer"]["step"]))
        for fragment in fragments(engine, replicated=True):
            pieces.want(WEIGHT, fragment.name, fragment.start, fragment.weight)
            for kind in kinds:
                pieces.want(kind, fragment.name, fragment.start, fragment.of(optimizer.state[fragment.owner][kind]))
        pieces.read()
    sync_model_weights(engine)
    if not by_weight:
        settings = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        optimizer.load_state_dict(rest["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
    go_to_step(lr_scheduler, cursor.step)
    for name, value in rest["engine"].items():
        setattr(engine, name, value)
    for name, value in rest["scaler"].items():
        setattr(loss_scaler(engine), name, value)
    if rank < cursor.workers:
        set_random_states(rest["random"])
    return rest["log"]  # type: ignore[no-any-return]


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}:{fragment.start}:{fragment.name}"


def _copied(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True).contiguous()


def _read_rest(folder: StoragePath, near: StoragePath, part: int) -> dict[str, Any]:
    """A worker's state beside its tensors.

    Raises:
        Damaged: it holds what could run code, whatever its digest says.
    """
    name = f"state_{part}.pt"
    try:
        return (near / name).read(read_rest)
    except pickle.UnpicklingError:
        (folder / DAMAGED).write_text(json.dumps({"file": name}))
        what = "more than tensors and plain values, which no training has written"
        raise CorruptCheckpoint(f"{folder / name} holds {what}") from None
