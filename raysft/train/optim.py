"""Optimizer and course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import get_scheduler

from raysft.config import TrainSection


def make_optimizer(parameters: list[torch.nn.Parameter], train: TrainSection) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay spares vectors (biases and norms)."""
    groups = [
        {"params": [p for p in parameters if _dimensions(p) >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if _dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.learning_rate, betas=train.betas, eps=train.epsilon
    )


def _dimensions(parameter: Any) -> int:
    # ZeRO-3 leaves an empty vector in place of the weight and keeps its shape aside.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> Any:
    """Warm-up, then the named course over the exact number of steps."""
    # The first step of a warm-up has rate 0: a run of one step would train nothing.
    warmup = min(math.ceil(train.warmup_ratio * steps), steps - 1)
    return get_scheduler(train.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
