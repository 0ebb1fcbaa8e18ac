"""State to go on from, and the trained model to keep."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysft.config import RequestError

TAG = "state"


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    step: int
    """Optimizer steps done when it was made."""
    since: int
    """Evaluations since then that were no better."""
    results: dict[str, float]
    """As ``eval_results.json`` holds them."""

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

    @classmethod
    def read(cls, folder: Path) -> Cursor:
        """The cursor of a checkpoint."""
        whole = json.loads((folder / "cursor.json").read_text())
        best = whole.pop("best", None)
        return cls(**whole, best=Best(**best) if best else None)


def save(engine: Any, folder: Path, cursor: Cursor) -> None:
    """Write this worker's part of a checkpoint: weights, optimizer, schedule, cursor and random states."""
    engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)
    # Dropout draws from torch alone; the order of the data comes from the seed and not from a running state.
    states = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    torch.save(states, folder / f"random_{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        (folder / "cursor.json").write_text(json.dumps(asdict(cursor)))


def load(engine: Any, folder: Path) -> Cursor:
    """Put the engine back to where a checkpoint was written.

    Raises:
        RequestError: it was written by another number of workers.
    """
    written_by = len(list(folder.glob("random_*.pt")))
    if written_by != dist.get_world_size():
        raise RequestError(
            f"{folder}: the checkpoint is of {written_by} workers and scaling.num_workers is {dist.get_world_size()}; "
            f"resume with {written_by}"
        )
    engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    states = torch.load(folder / f"random_{dist.get_rank()}.pt", weights_only=True)
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return Cursor.read(folder)


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint that Ray Train has accepted, which it does when every worker's part is there."""
    snapshot = checkpoints / "checkpoint_manager_snapshot.json"
    if not snapshot.exists():
        return None
    # Ray's own list of accepted checkpoints; folders that are not in it may be half written.
    names = set(re.findall(r'"(checkpoint_[^"]+)"', snapshot.read_text()))
    found = sorted(name for name in names if (checkpoints / name / "cursor.json").exists())
    return checkpoints / found[-1] if found else None


def cursor_of(checkpoints: Path) -> Cursor | None:
    """The cursor of the newest complete checkpoint."""
    folder = newest(checkpoints)
    return Cursor.read(folder) if folder else None


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the trained model or adapter so that transformers or peft loads it. All workers call it, the first one writes.

    Args:
        model: the transformers or peft model inside the engine.
        tokenizer: goes beside it.
        folder: is replaced in one move when all is written.
    """
    import deepspeed

    writes = dist.get_rank() == 0
    state: dict[str, torch.Tensor] = {}
    adapters_only = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if adapters_only and not parameter.requires_grad:
            continue
        # With ZeRO-3 each worker has a part of it; one parameter at a time is put together.
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if writes:
                state[name] = parameter.detach().cpu().clone()
    if not writes:
        return
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    if adapters_only:
        if begun_with := getattr(model, "begun_with", None):
            model.save_pretrained(draft, path_initial_model_for_weight_conversion=begun_with)
        else:
            model.save_pretrained(draft, state_dict=state)
    else:
        model.config.use_cache = True
        model.save_pretrained(draft, state_dict=state)
        model.config.use_cache = False
    (draft / "README.md").unlink(missing_ok=True)  # peft's empty form; the run directory holds a model card
    tokenizer.save_pretrained(draft)
    put_in_place(draft, folder)


def put_in_place(draft: Path, folder: Path) -> None:
    """Let a folder that is whole take the place of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
