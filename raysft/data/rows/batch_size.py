"""Choose the number of rows in a step, with ``train.global_batch_size: auto``. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

MAX_AUTO_BATCH_SIZE = 32
"""Largest number of rows in a step with ``train.global_batch_size: auto``."""
MIN_AUTO_STEPS = 100
"""Minimum number of steps that training should have: Adam moves a weight by no more than the learning rate in each."""


def auto_batch_size(epochs: Iterable[np.ndarray], count: float = math.inf) -> int:
    """Choose the rows in a step: 32 if that gives at least 100 steps in all, else fewer.

    The number is a power of two, divisible by the usual numbers of workers, and no larger than an epoch needs. It is raised
    until each step has loss tokens. For a large data set only the first epochs are read.

    Args:
        epochs: [rows] loss tokens of each row, epoch by epoch.
        count: number of epochs to train, possibly fractional. Default: all.

    >>> [auto_batch_size([np.ones(rows)] * epochs) for rows, epochs in ((3169, 1), (3168, 1), (500, 3), (40, 1), (5, 200))]
    [32, 16, 8, 1, 8]
    >>> auto_batch_size([np.ones(3200)] * 2, 1.5), auto_batch_size([np.ones(3200)], 0.5)
    (32, 16)
    >>> auto_batch_size([np.array([4, 0, 7, 0, 0, 9])])
    2
    """
    known: list[np.ndarray] = []
    total = 0
    for number, epoch in enumerate(epochs):
        known.append(epoch)
        total += math.ceil(min(1.0, count - number) * len(epoch))
        if -(-total // MAX_AUTO_BATCH_SIZE) >= MIN_AUTO_STEPS:
            break
    shortest = min(map(len, known))
    size = MAX_AUTO_BATCH_SIZE
    while size > 1 and (-(-total // size) < MIN_AUTO_STEPS or size >= 2 * shortest):
        size //= 2
    while size < MAX_AUTO_BATCH_SIZE and not all(_each_step_learns(epoch, size) for epoch in known):
        size *= 2
    return size


def _each_step_learns(loss_tokens: np.ndarray, size: int) -> bool:
    return bool(np.add.reduceat(loss_tokens, np.arange(0, len(loss_tokens), size)).all())
