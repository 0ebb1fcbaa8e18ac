"""The state of a training, apart from its config, model and data, in a folder that any number of workers can resume from.

The folder is local or in an object store. Each worker writes its fragments (``part_0.safetensors``), the rest of its state
(``state_0.pt``) and, after both, their digests (``part_0.json``); rank 0 also writes ``cursor.json``. A checkpoint is complete
when the digests of all workers exist. Fragments are stored by the parameter's name and their offset in it, so they are
independent of the number of workers and of the ZeRO stage.
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
"""The kind of a fragment of weights; the others are the optimizer's own names (``exp_avg`` …)."""
DAMAGED = "damaged.json"
SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""Settings in an optimizer's state that the config decides."""


class CorruptCheckpoint(RuntimeError):
    """A checkpoint differs from what was written. It is marked, and the workers restart from the one before."""


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint in memory, so that training can continue while it is written."""

    rank: int
    tensors: dict[str, torch.Tensor]
    """By kind, first element and parameter (``exp_avg:0:model.norm.weight``)."""
    rest: dict[str, Any]
    """Random states, the optimizer's counters, the latest records of the log."""
    cursor: Cursor

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@torch.no_grad()
def snapshot(engine: Any, cursor: Cursor, log: Sequence[Any] = ()) -> Snapshot:
    """Copy this worker's part of the state.

    Args:
        engine: the DeepSpeed engine.
        cursor: the training's position.
        log: the latest records of ``trainer_log.jsonl``, in case the driver died before it wrote them.
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
    """Write one worker's part; the other workers write theirs into the same folder."""
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
    """Remove what exists of one worker's part, so that a failed attempt takes no space."""
    for name in (f"part_{part.rank}.json", f"part_{part.rank}.safetensors", f"state_{part.rank}.pt"):
        (folder / name).remove()
    if folder.local and not folder.entries():
        folder.remove()


def _digested(stream: Any, save: Callable[[Any], object]) -> dict[str, Any]:
    writer = _DigestWriter(stream)
    save(writer)
    return {"bytes": writer.size_bytes, "sha256": writer.digest.hexdigest()}


class _DigestWriter:
    """Count and hash what is written, so that it need not be read again or stored on disk before it is uploaded."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest, self.size_bytes = stream, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        view = memoryview(content)
        self.digest.update(view)
        self.size_bytes += view.nbytes
        self._stream.write(content)
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: there is no buffer."""


def complete(checkpoints: StoragePath | Path) -> Iterator[StoragePath]:
    """Yield the complete checkpoints that are not known to be damaged, the newest first."""
    for _, folder in _complete(StoragePath.of(checkpoints)):
        yield folder


def newest(checkpoints: StoragePath | Path) -> ResumePoint | None:
    """Return the newest complete checkpoint: the one that a training resumes from."""
    return next((ResumePoint(folder, cursor) for cursor, folder in _complete(StoragePath.of(checkpoints))), None)


def folder_name(step: int, attempt: str) -> str:
    """Return the name of a checkpoint's folder; restarted workers never mix their parts with those of an earlier attempt."""
    return f"checkpoint_{step:08d}_{attempt}"


def prune(checkpoints: StoragePath, keep: int) -> None:
    """Remove all complete checkpoints but the newest ``keep``, and incomplete ones older than the newest.

    Temporary checkpoints count among the newest, but displace no others: those stay when the temporary ones are removed.
    """
    found = _complete(checkpoints)
    if not found:
        return
    permanent = [folder for cursor, folder in found if not cursor.temporary][:keep]
    for _, folder in found[keep:]:
        if folder not in permanent:
            folder.remove()
    complete_names = {folder.name for _, folder in found}
    for name in checkpoints.entries():
        step = name.removeprefix("checkpoint_").split("_")[0]
        if name not in complete_names and step.isdigit() and int(step) < found[0][0].step:
            (checkpoints / name).remove()


def remove_temporary(checkpoints: StoragePath) -> None:
    """Remove the checkpoints that only protected work until the model was written."""
    temporary = [folder for cursor, folder in _complete(checkpoints) if cursor.temporary]
    for folder in temporary:
        folder.remove()
    if temporary and checkpoints.local and not checkpoints.entries():
        checkpoints.remove()


def _complete(checkpoints: StoragePath) -> list[tuple[Cursor, StoragePath]]:
    """List the complete checkpoints with their cursors, the newest first, from one listing of all files."""
    files: dict[str, dict[str, Entry]] = {}
    for path, entry in checkpoints.walk().items():
        name, _, file = path.partition("/")
        if name.startswith("checkpoint_") and file:
            files.setdefault(name, {})[file] = entry
    found = []
    for name, inside in files.items():
        folder = checkpoints / name
        if cursor := _cursor_if_complete(folder, inside):
            found.append((cursor, folder))
    return sorted(found, key=lambda item: (item[0].step, item[1].name), reverse=True)


def _cursor_if_complete(folder: StoragePath, files: Mapping[str, Entry]) -> Cursor | None:
    """Return the cursor of a checkpoint; None if it is incomplete or known to be damaged."""
    if DAMAGED in files or "cursor.json" not in files:
        return None
    try:
        content = (folder / "cursor.json").read_bytes()
        # The driver and Ray Data use the cursor before all files are checked.
        if (
            json.loads((folder / "part_0.json").read_text())["cursor.json"]["sha256"]
            != hashlib.sha256(content).hexdigest()
        ):
            return None
        cursor = Cursor.parse(content)
        for rank in range(cursor.workers):
            if any(name not in files for name in (f"part_{rank}.json", f"part_{rank}.safetensors", f"state_{rank}.pt")):
                return None
            # In an object store a file exists whole or not at all.
            for name, digest in json.loads((folder / f"part_{rank}.json").read_text()).items() if folder.local else ():
                if files[name].size != digest["bytes"]:
                    return None
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # half written
    return cursor


def check(folder: StoragePath, cursor: Cursor, scratch: Path) -> dict[int, StoragePath]:
    """Compare a checkpoint with its digests. Each worker reads some of the parts; all workers return or raise alike.

    Args:
        folder: the checkpoint.
        cursor: the checkpoint's cursor.
        scratch: a local folder for copies of parts in an object store.

    Returns:
        Part number → local folder, for the parts that this worker has read.

    Raises:
        CorruptCheckpoint: a file differs from what was written.
    """
    rank, workers = dist.get_rank(), dist.get_world_size()
    local_parts: dict[int, StoragePath] = {}
    found = None
    for part in range(rank, cursor.workers, workers):
        local_parts[part] = folder if folder.local else StoragePath.of(scratch)
        found = found or _corrupt_file(folder, part, local_parts[part])
    corrupt_files: list[Any] = [None] * workers
    dist.all_gather_object(corrupt_files, found)
    corrupt = next((name for name in corrupt_files if name), None)
    if corrupt:
        if rank == 0:
            (folder / DAMAGED).write_text(json.dumps({"file": corrupt}))
        dist.barrier()
        raise CorruptCheckpoint(f"checkpoint after step {cursor.step}: {folder / corrupt} is not what was written")
    return local_parts


def _corrupt_file(folder: StoragePath, part: int, local_folder: StoragePath) -> str | None:
    """Return the first file of a part that differs from its digest. The part is copied to ``local_folder`` first."""
    for name, expected in json.loads((folder / f"part_{part}.json").read_text()).items():
        try:
            if local_folder != folder:
                local = (local_folder / name).local
                assert local
                (folder / name).download(local)
            digest = (local_folder / name).read(lambda file: hashlib.file_digest(file, "sha256").hexdigest())
        except FileNotFoundError:
            return str(name)
        if digest != expected["sha256"]:
            return str(name)
    return None


@torch.no_grad()
def load(engine: Any, lr_scheduler: Any, resume: ResumePoint) -> list[Any]:
    """Restore the state of a training from a checkpoint that any number of workers wrote.

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
        rest = _read_rest(folder, local_parts.get(own, folder), own)
        reader = TensorReader({part: local_parts.get(part, folder) for part in range(cursor.workers)}, local_parts)
        kinds = [kind for kind in reader.kinds if kind != WEIGHT and by_weight]
        if by_weight:
            for owner in owners(engine):
                optimizer.state[owner] = {
                    **{name: counter(value, owner, optimizer) for name, value in rest["optimizer"].items()},
                    **{kind: torch.zeros_like(owner, requires_grad=False) for kind in kinds},
                }
            if is_cpu_adam(optimizer):
                replay_cpu_adam(optimizer, int(rest["optimizer"]["step"]))
        for fragment in fragments(engine, replicated=True):
            reader.want(WEIGHT, fragment.name, fragment.start, fragment.weight)
            for kind in kinds:
                reader.want(kind, fragment.name, fragment.start, fragment.of(optimizer.state[fragment.owner][kind]))
        reader.read()
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


def _read_rest(folder: StoragePath, local_folder: StoragePath, part: int) -> dict[str, Any]:
    """Read a worker's state besides its tensors.

    Raises:
        CorruptCheckpoint: the file could run code, whatever its digest says.
    """
    name = f"state_{part}.pt"
    try:
        return (local_folder / name).read(read_rest)
    except pickle.UnpicklingError:
        (folder / DAMAGED).write_text(json.dumps({"file": name}))
        what = "more than tensors and plain values, which no training has written"
        raise CorruptCheckpoint(f"{folder / name} holds {what}") from None
