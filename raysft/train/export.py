"""The trained model, as transformers and peft load it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


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
    """Let a folder that is whole take the place of another one; one that was put there before stays."""
    if folder.exists() and not draft.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
