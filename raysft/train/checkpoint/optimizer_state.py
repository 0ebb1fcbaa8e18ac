"""The state of a training besides its tensors: counters, random states and the scale of the loss."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from raysft.train.checkpoint.zero_shards import owners
from raysft.train.deepspeed_internals import base_optimizer, is_cpu_adam


def is_by_weight(engine: Any) -> bool:
    """Return True if the optimizer's state is one number per weight, and counters."""
    if engine.zero_optimization_stage():
        return True  # ZeRO accepts no other optimizer
    return isinstance(engine.optimizer, torch.optim.Adam)


def is_for_each_weight(state: Any, owner: torch.Tensor) -> bool:
    """Return True if an optimizer state has one number for each weight of its owner."""
    return torch.is_tensor(state) and state.dim() > 0 and state.numel() == owner.numel()


def counters(engine: Any) -> dict[str, Any]:
    """Return the optimizer states that are the same for all weights: the number of steps."""
    optimizer = base_optimizer(engine)
    for owner in owners(engine):
        found = {name: value for name, value in optimizer.state[owner].items() if not is_for_each_weight(value, owner)}
        return {name: value.cpu().clone() if torch.is_tensor(value) else value for name, value in found.items()}
    return {}


def counter(value: Any, owner: torch.Tensor, optimizer: Any) -> Any:
    """Return a counter for one owner: a number for DeepSpeed's CPU-Adam, a tensor for torch, on the device for fused kernels."""
    if is_cpu_adam(optimizer):
        return int(value) if torch.is_tensor(value) else value
    value = torch.tensor(float(value)) if isinstance(value, int) else value
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
    """Load tensors and plain values alone, and the projectors of GaLore and APOLLO."""
    theirs = sys.modules.get("pytorch_optimizer.optimizer.utils.galore")
    with torch.serialization.safe_globals([theirs.GaLoreProjector] if theirs else []):
        return torch.load(file, weights_only=True)  # type: ignore[no-any-return]
