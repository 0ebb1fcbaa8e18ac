"""Inputs on their way to the device: copied while it still computes, along with what it would otherwise have to be asked for.

A GPU lags behind the CPU that tells it what to do. Whenever the CPU asks for a number that the GPU has yet to compute (which
tokens have a loss, where examples begin), both wait for each other, and the GPU has nothing to do afterwards. So such numbers
are computed here, before the rows are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from raysft.data.types import IGNORE_INDEX
from raysft.models.examples import Examples


def uploaded(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the inputs, which may be nested, with their tensors on the device; everything else stays.

    A GPU copies them from pinned memory on a separate stream, while it computes; what is computed next waits for them.
    """
    if device.type != "cuda":
        return _mapped(lambda tensor: tensor.to(device), inputs)
    side, current = _side_stream(device), torch.cuda.current_stream(device)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.pin_memory().to(device, non_blocking=True)
        there.record_stream(current)  # otherwise its memory could be reused while it is in use there
        return there

    with torch.cuda.stream(side):
        found = _mapped(copied, inputs)
    current.wait_stream(side)
    return found


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _mapped(function, value) for name, value in values.items()}
    if isinstance(values, Examples):
        return values.with_tensors(function)
    return function(values) if isinstance(values, torch.Tensor) else values


@lru_cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def predicting(targets: np.ndarray) -> torch.Tensor:
    """Return the places, in all rows one after another, of the tokens that predict one with a loss; the first one if none does.

    The other workers call the head and send gradients then, so this one must do the same.

    >>> predicting(np.array([[5, -100, -100], [-100, 7, -100]])).tolist()
    [0, 4]
    >>> predicting(np.array([[-100, -100]])).tolist()
    [0]

    Args:
        targets: [rows, tokens] what each token should predict.
    """
    places = np.flatnonzero(targets != IGNORE_INDEX)
    return torch.as_tensor(places if len(places) else np.zeros(1, dtype=np.int64))
