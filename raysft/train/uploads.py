"""Inputs on their way to the device: copied while it still computes, and with what it would otherwise have to be asked for.

A GPU works behind the processor that tells it what to do. Whenever the processor asks for a number that the GPU has yet to compute
(which tokens have a loss, where examples begin), both wait for each other, and the GPU has nothing to do afterwards. So such
numbers are found here, before the rows are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from raysft.data.types import IGNORE_INDEX


def uploaded(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the inputs, which may be nested, with their tensors on the device; everything else stays.

    A GPU copies them from pinned memory on a stream of its own, beside what it computes; what is computed next waits for them.
    """
    if device.type != "cuda":
        return _mapped(lambda tensor: tensor.to(device), inputs)
    side, current = _side_stream(device), torch.cuda.current_stream(device)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.pin_memory().to(device, non_blocking=True)
        there.record_stream(current)  # else its memory could be given away while it is in use there
        return there

    with torch.cuda.stream(side):
        found = _mapped(copied, inputs)
    current.wait_stream(side)
    return found


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _mapped(function, value) for name, value in values.items()}
    return function(values) if isinstance(values, torch.Tensor) else values


@lru_cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


def predicting(targets: np.ndarray) -> torch.Tensor:
    """Return the places, in all rows one after the other, of the tokens that predict one with a loss; the first one if none does.

    The other workers call the head and send gradients then, so this one must do the same.

    >>> predicting(np.array([[5, -100, -100], [-100, 7, -100]])).tolist()
    [0, 4]
    >>> predicting(np.array([[-100, -100]])).tolist()
    [0]

    Args:
        targets: [rows, tokens] what each token is to predict.
    """
    places = np.flatnonzero(targets != IGNORE_INDEX)
    return torch.as_tensor(places if len(places) else np.zeros(1, dtype=np.int64))


def examples(positions: np.ndarray) -> dict[str, Any]:
    """Return where examples begin in all rows, one after the other.

    >>> found = examples(np.array([[0, 1, 2, 0], [0, 1, 0, 1]]))
    >>> found["bounds"].tolist(), found["longest"], found["several"]
    ([0, 3, 4, 6, 8], 3, True)

    Args:
        positions: [rows, tokens], starting at 0 in each example, and where padding begins.

    Returns:
        ``bounds`` [examples + 1] int32, ``longest``, the most tokens of one, and ``several``, True if a row has more than one.
    """
    begins = positions == 0
    begins[:, 0] = True
    bounds = np.append(np.flatnonzero(begins), positions.size)
    return {
        "bounds": torch.as_tensor(bounds, dtype=torch.int32),
        "longest": int(np.diff(bounds).max()),
        "several": bool(begins[:, 1:].any()),
    }


def examples_of_lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """Return what ``examples`` does, for examples of some lengths that are one row."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {"bounds": bounds, "longest": max(lengths), "several": len(lengths) > 1}
