"""State to go on from: what a training is, apart from its config, its model and its data.

A checkpoint is a folder. Each worker writes the fragments that it keeps (``part_0.safetensors``), the rest of its state
(``state_0.pt``) and, when both are written, their digests (``part_0.json``); the first worker also writes ``cursor.json``. It is
complete when all workers' digests are there. Fragments are kept by the parameter's name and their place in it, so that any number
of workers, under any stage of ZeRO, can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from raysft.records import RunFailed
from raysft.train.fragments import Fragment, base_optimizer, fragments, owners, spread

WEIGHT = "weight"
"""Kind of a fragment beside the optimizer's own names (``exp_avg`` …)."""
DAMAGED = "damaged.json"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    """Optimizer steps done when it was made."""
    since: int
    """Evaluations since the last improvement."""
    results: dict[str, float]
    """As ``eval_results.json`` holds them."""
    bar: float = math.inf
    """The loss that was the last improvement by more than ``early_stopping.threshold``."""

    @property
    def loss(self) -> float:
        """By which it is the best."""
        return self.results["eval_loss"]


@dataclass(frozen=True)
class Cursor:
    """How far a training is: with seed and manifest it says exactly what is left."""

    step: int
    """Optimizer steps done."""
    rows: int
    """Rows consumed, over all workers."""
    tokens: int
    """Tokens without padding in them."""
    identity: dict[str, str]
    """What it is a training of: hashes of config, model and each source, by name."""
    best: Best | None = None
    workers: int = 1
    """How many wrote the checkpoint."""

    @classmethod
    def read(cls, folder: Path) -> Cursor:
        """The cursor of a checkpoint."""
        whole = json.loads((folder / "cursor.json").read_text())
        best = whole.pop("best", None)
        return cls(**whole, best=Best(**best) if best else None)


class Damaged(RuntimeError):
    """A checkpoint is not what was written; it is marked, and the workers start again from the one before."""


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint in memory, so that the training can go on while it is written."""

    rank: int
    tensors: dict[str, torch.Tensor]
    """By kind, first element and parameter (``exp_avg:0:model.norm.weight``)."""
    rest: dict[str, Any]
    """Random states, the optimizer's counters, the learning rate's course."""
    cursor: Cursor

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@torch.no_grad()
def snapshot(engine: Any, schedule: Any, cursor: Cursor, log: Sequence[Any] = ()) -> Snapshot:
    """Copy this worker's part of the state.

    Args:
        engine: the DeepSpeed engine.
        schedule: of the learning rate.
        cursor: how far the training is.
        log: the latest records of ``trainer_log.jsonl``: the driver may have died before it wrote them.
    """
    optimizer = base_optimizer(engine)
    tensors = {}
    by_weight = _is_by_weight(engine)
    for fragment in fragments(engine):
        tensors[_key(WEIGHT, fragment)] = _copied(fragment.weight)
        for kind, state in optimizer.state[fragment.owner].items() if by_weight else ():
            if _is_for_each_weight(state, fragment.owner):
                tensors[_key(kind, fragment)] = _copied(fragment.of(state))
    rest = {
        "random": _random_states(),
        "optimizer": _counters(engine) if by_weight else optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": _numbers(getattr(engine.optimizer, "loss_scaler", None)),
        "log": list(log),
        "engine": {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
    }
    return Snapshot(dist.get_rank(), tensors, rest, replace(cursor, workers=dist.get_world_size()))


def write(part: Snapshot, folder: Path) -> None:
    """Write one worker's part; others write theirs into the same folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = [f"part_{part.rank}.safetensors", f"state_{part.rank}.pt"]
    save_file(part.tensors, folder / names[0])
    torch.save(part.rest, folder / names[1])
    if part.rank == 0:
        names.append("cursor.json")
        _write_whole(folder / "cursor.json", asdict(part.cursor))
    digests = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}
    _write_whole(folder / f"part_{part.rank}.json", digests)


def _write_whole(file: Path, content: Any) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(content))
    draft.replace(file)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def complete(checkpoints: Path) -> Iterator[Path]:
    """Checkpoints of which every worker's part is there and none is known to be damaged, the newest first."""
    found = [(cursor.step, folder) for folder in checkpoints.glob("checkpoint_*") if (cursor := _whole(folder))]
    for _, folder in sorted(found, reverse=True):
        yield folder


def newest(checkpoints: Path) -> Path | None:
    """The one to go on from."""
    return next(complete(checkpoints), None)


def cursor_of(checkpoints: Path) -> Cursor | None:
    """The cursor of the one to go on from."""
    folder = newest(checkpoints)
    return Cursor.read(folder) if folder else None


def _whole(folder: Path) -> Cursor | None:
    """The cursor of a complete checkpoint."""
    try:
        cursor = Cursor.read(folder)
        if (folder / DAMAGED).exists():
            return None
        for rank in range(cursor.workers):
            for name, said in json.loads((folder / f"part_{rank}.json").read_text()).items():
                if (folder / name).stat().st_size != said["bytes"]:
                    return None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # half written
    return cursor


def check(folder: Path) -> None:
    """Compare a checkpoint with its digests; each worker reads its share, and all come to the same end.

    Raises:
        Damaged: a file is not what was written.
    """
    cursor, rank, workers = Cursor.read(folder), dist.get_rank(), dist.get_world_size()
    found = next((wrong for part in range(rank, cursor.workers, workers) if (wrong := _wrong(folder, part))), None)
    everyones: list[Any] = [None] * workers
    dist.all_gather_object(everyones, found)
    wrong = next((each for each in everyones if each), None)
    if wrong:
        if rank == 0:
            _write_whole(folder / DAMAGED, {"file": wrong})
        dist.barrier()
        raise Damaged(f"checkpoint after step {cursor.step}: {folder / wrong} is not what was written")


def _wrong(folder: Path, part: int) -> str | None:
    for name, said in json.loads((folder / f"part_{part}.json").read_text()).items():
        if _digest(folder / name) != said["sha256"]:
            return str(name)
    return None


@torch.no_grad()
def load(engine: Any, schedule: Any, folder: Path) -> tuple[Cursor, list[Any]]:
    """Put a training back to where a checkpoint was written, by as many workers or by others.

    With other workers, those that were not there draw random numbers of their own (dropout); all else goes on as it was.

    Args:
        engine: as it was made for the same config.
        schedule: of the learning rate.
        folder: the checkpoint.

    Returns:
        Its cursor, and the records of the log that it came with, on the first worker.

    Raises:
        Damaged: it is not what was written.
        RunFailed: it is of another model.
    """
    check(folder)
    cursor, rank = Cursor.read(folder), dist.get_rank()
    rest = _read_rest(folder / f"state_{rank if rank < cursor.workers else 0}.pt")
    optimizer, by_weight = base_optimizer(engine), _is_by_weight(engine)
    with ExitStack() as stack:
        pieces = _Pieces(folder, cursor.workers, stack)
        if by_weight:
            for owner in owners(engine):
                optimizer.state[owner] = {
                    **{name: _counter(value, owner, optimizer) for name, value in rest["optimizer"].items()},
                    **{kind: torch.zeros_like(owner, requires_grad=False) for kind in pieces.kinds},
                }
            _count_again(optimizer, rest["optimizer"].get("step"))
        for fragment in fragments(engine, all_of_them=True):
            pieces.copy(WEIGHT, fragment, fragment.weight)
            for kind in pieces.kinds if by_weight else ():
                pieces.copy(kind, fragment, fragment.of(optimizer.state[fragment.owner][kind]))
    spread(engine)
    if not by_weight:
        optimizer.load_state_dict(rest["optimizer"])
    schedule.load_state_dict(rest["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    for name, value in rest["engine"].items():
        setattr(engine, name, value)
    for name, value in rest["scaler"].items():
        setattr(engine.optimizer.loss_scaler, name, value)
    if rank < cursor.workers:
        _set_random_states(rest["random"])
    return cursor, rest["log"]


class _Pieces:
    """The tensors of a checkpoint, of which a worker reads no more than it keeps."""

    def __init__(self, folder: Path, workers: int, stack: ExitStack) -> None:
        from safetensors import safe_open

        self._places: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for part in range(workers):
            file = stack.enter_context(safe_open(folder / f"part_{part}.safetensors", "pt"))
            for key in file.keys():  # noqa: SIM118  # no mapping
                kind, start, name = key.split(":", 2)
                size = file.get_slice(key).get_shape()[0]
                self._places.setdefault((kind, name), []).append((int(start), size, file, key))
        self.kinds = sorted({kind for kind, _ in self._places} - {WEIGHT})

    def copy(self, kind: str, fragment: Fragment, into: torch.Tensor) -> None:
        """Fill a fragment from those that were written."""
        missing = len(into)
        for start, size, file, key in self._places.get((kind, fragment.name), ()):
            first = max(start, fragment.start)
            last = min(start + size, fragment.start + len(into))
            if first < last:
                values = file.get_slice(key)[first - start : last - start]
                into[first - fragment.start : last - fragment.start].copy_(values)
                missing -= last - first
        if missing:
            raise RunFailed(f"the checkpoint is of another model: it holds no {kind} of {fragment.name}")


def _key(kind: str, fragment: Fragment) -> str:
    return f"{kind}:{fragment.start}:{fragment.name}"


def _copied(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to("cpu", copy=True).contiguous()


def _is_by_weight(engine: Any) -> bool:
    """Whether the optimizer keeps nothing but a number for each weight, and counters."""
    if engine.zero_optimization_stage():
        return True  # others are refused there
    return isinstance(engine.optimizer, torch.optim.Adam)


def _is_for_each_weight(state: Any, owner: torch.Tensor) -> bool:
    return torch.is_tensor(state) and state.dim() > 0 and state.numel() == owner.numel()


def _counters(engine: Any) -> dict[str, Any]:
    """What an optimizer keeps besides, the same for all weights: the number of steps."""
    optimizer = base_optimizer(engine)
    for owner in owners(engine):
        found = {name: value for name, value in optimizer.state[owner].items() if not _is_for_each_weight(value, owner)}
        return {name: value.cpu().clone() if torch.is_tensor(value) else value for name, value in found.items()}
    return {}


def _counter(value: Any, owner: torch.Tensor, optimizer: Any) -> Any:
    """A counter of its own for each owner, where the optimizer wants it: torch's fused kernels on the device."""
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(owner.device if on_device else "cpu", copy=True) if torch.is_tensor(value) else value


def _count_again(optimizer: Any, steps: Any) -> None:
    """DeepSpeed's CPU-Adam multiplies powers of its betas up, a factor each step, where nobody can set them; another way to
    compute them differs in the last digit."""
    if not hasattr(optimizer, "ds_opt_adam"):
        return
    nothing = [torch.zeros(1) for _ in range(4)]
    for step in range(1, int(steps) + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *optimizer.param_groups[0]["betas"], 1.0, 0.0, True, *nothing
        )


def _numbers(scaler: Any) -> dict[str, Any]:
    """The state of a loss scaler."""
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}


def _random_states() -> dict[str, Any]:
    name, keys, *numpys = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *numpys],
        "python": random.getstate(),
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *numpys = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numpys))
    random.setstate(states["python"])


def _read_rest(file: Path) -> dict[str, Any]:
    """Tensors and plain values alone are loaded, and what GaLore and APOLLO keep beside them.

    Raises:
        Damaged: it holds anything else, which could run code, whatever its digest says.
    """
    theirs = sys.modules.get("pytorch_optimizer.optimizer.utils.galore")
    with torch.serialization.safe_globals([theirs.GaLoreProjector] if theirs else []):
        try:
            return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
        except pickle.UnpicklingError:
            _write_whole(file.parent / DAMAGED, {"file": file.name})
            raise Damaged(f"{file} holds more than tensors and plain values, which no training has written") from None
