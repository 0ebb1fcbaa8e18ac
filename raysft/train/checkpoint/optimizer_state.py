"""The state of a training run besides its tensors: counters, random states and the scale of the loss."""

from __future__ import annotations

import copy
import importlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raysft.train.checkpoint.blocks import OF_BLOCKS, dequantized, is_quantized
from raysft.train.checkpoint.zero_shards import owners
from raysft.train.deepspeed_internals import base_optimizer, is_cpu_adam
from raysft.train.optimizer_makers import is_elementwise

SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")
"""Settings in an optimizer's groups that the config decides."""
LIBRARIES = ("pytorch_optimizer.", "apollo_torch.")
"""Packages whose classes an optimizer's state may hold (projectors, blocks), besides tensors and plain values."""


def is_by_weight(engine: Any) -> bool:
    """Return True if the optimizer's state is some numbers per weight, and counters."""
    if engine.zero_optimization_stage():
        return True  # the config refuses any other optimizer
    return is_elementwise(engine.optimizer)


def is_for_each_weight(state: Any, owner: torch.Tensor) -> bool:
    """Return True if an optimizer state has one number for each weight of its owner."""
    return torch.is_tensor(state) and state.dim() > 0 and state.numel() == owner.numel()


def kinds_of(engine: Any) -> list[str]:
    """Return the names of the states that have one number for each weight."""
    largest = max(owners(engine), key=torch.Tensor.numel)
    states = base_optimizer(engine).state[largest]
    return [name for name, value in states.items() if name not in OF_BLOCKS and is_for_each_weight(value, largest)]


def values_of(optimizer: Any, owner: torch.Tensor, kind: str) -> torch.Tensor:
    """Return a state that has one number for each weight; as numbers, if it is kept as codes of 8 bits."""
    state = optimizer.state[owner]
    return dequantized(state, kind) if is_quantized(state, kind) else state[kind]


def copied(value: Any) -> Any:
    """Return a copy of a state dict that steps do not change while it is written, with its tensors in CPU memory."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    return copy.deepcopy(value)


def counters(engine: Any) -> dict[str, Any]:
    """Return the optimizer states that are the same for all weights: the number of steps."""
    optimizer, kinds = base_optimizer(engine), kinds_of(engine)
    for owner in owners(engine):
        found = {
            name: value
            for name, value in optimizer.state[owner].items()
            if name not in (*kinds, *OF_BLOCKS) and not is_for_each_weight(value, owner)
        }
        return copied(found)  # type: ignore[no-any-return]
    return {}


def group_counters(optimizer: Any) -> list[dict[str, Any]]:
    """Return what an optimizer counts in its parameter groups, for each group: what differs from the settings it was made with."""
    return [
        {name: copied(value) for name, value in group.items() if _is_counted(optimizer, name, value)}
        for group in optimizer.param_groups
    ]


def _is_counted(optimizer: Any, name: str, value: Any) -> bool:
    if name == "params" or name in SETTINGS:
        return False
    return name not in optimizer.defaults or torch.is_tensor(value) or value != optimizer.defaults[name]


def set_group_counters(optimizer: Any, counted: list[dict[str, Any]]) -> None:
    """Restore what ``group_counters`` returned."""
    for group, values in zip(optimizer.param_groups, counted, strict=False):
        group.update(values)


def counter(value: Any, owner: torch.Tensor, optimizer: Any) -> Any:
    """Return a counter for one owner: a number for DeepSpeed's CPU-Adam, a tensor for torch, on the device for fused kernels."""
    if is_cpu_adam(optimizer):
        return int(value) if torch.is_tensor(value) else value
    if isinstance(optimizer, torch.optim.Adam) and isinstance(value, int):
        value = torch.tensor(float(value))
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return value.to(owner.device if on_device else "cpu", copy=True) if torch.is_tensor(value) else value


def numbers(scaler: Any) -> dict[str, Any]:
    """Return the state of a loss scaler."""
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators of this process."""
    name, keys, *numpys = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *numpys],
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what ``random_states`` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    name, keys, *numpys = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numpys))
    random.setstate(states["python"])


def read_rest(file: Any) -> dict[str, Any]:
    """Load tensors and plain values, and objects of the optimizers' own libraries."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    allowed = [
        getattr(importlib.import_module(module), cls)
        for module, _, cls in (name.rpartition(".") for name in unsafe)
        if module.startswith(LIBRARIES) or (module, cls) == ("collections", "deque")
    ]
    file.seek(0)
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
