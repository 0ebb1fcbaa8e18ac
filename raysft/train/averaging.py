"""Optimizers that train weights other than those to use: schedule-free ones and SPlus average them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raysft.train.checkpoint.zero_shards import owners
from raysft.train.deepspeed_internals import base_optimizer, sync_model_weights


@contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """Give the model the weights to use for the block, then restore exactly those being trained. All workers call it.

    In the meantime it keeps a copy of the trained weights in float32. With other optimizers it does nothing.
    """
    optimizer = base_optimizer(engine)
    if not (averages(engine) and optimizer.state):
        yield
        return
    trained = owners(engine)
    kept = [owner.detach().clone() for owner in trained]
    _switch(optimizer, trained, "eval")
    sync_model_weights(engine)
    try:
        yield
    finally:
        _switch(optimizer, trained, "train")
        with torch.no_grad():
            for owner, weights in zip(trained, kept, strict=True):
                owner.copy_(weights)
        sync_model_weights(engine)


def averages(engine: Any) -> bool:
    """Return True if the optimizer trains weights other than those to use."""
    return callable(getattr(base_optimizer(engine), "eval", None))


def _switch(optimizer: Any, trained: list[torch.Tensor], mode: str) -> None:
    groups = optimizer.param_groups
    empty = not any(group["params"] for group in groups)
    if empty:  # ZeRO-3 fills them only during a step, with one tensor for each group
        for group, owner in zip(groups, trained, strict=True):
            group["params"] = [owner]
    getattr(optimizer, mode)()
    if empty:
        for group in groups:
            group["params"] = []
