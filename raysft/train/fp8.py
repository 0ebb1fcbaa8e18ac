"""Matrix multiplications in 8-bit floats, through torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from raysft.errors import RequestError

HOPPER = (8, 9)
"""Compute capability from which on a GPU multiplies 8-bit floats."""


def check_fp8(device: torch.device) -> None:
    """Refuse where 8-bit floats would only be imitated.

    Raises:
        RequestError: the device cannot multiply them, or torchao is not installed.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < HOPPER:
        name = torch.cuda.get_device_name(device) if capability else "a CPU"
        raise RequestError(
            f"train.fp8=torchao needs a GPU of the Ada or Hopper generation or later, not {name}; set it off"
        )
    if importlib.util.find_spec("torchao") is None:
        raise RequestError("train.fp8=torchao needs the package torchao; pip install 'raysft[fp8]' on every node")


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Convert the linear layers inside the model, and make sure that it happened.

    Raises:
        RequestError: it cannot be done here.
    """
    check_fp8(device)
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    convert_to_float8_training(
        model, config=Float8LinearConfig.from_recipe_name("rowwise"), module_filter_fn=_takes_part
    )
    if not any("Float8" in type(module).__name__ for module in model.modules()):
        raise RequestError("train.fp8=torchao: no layer of this model can be computed in 8 bits; set it off")


def _takes_part(module: Any, name: str) -> bool:
    """Linear layers whose sides the hardware can split, but the output head, which is computed in chunks of its own."""
    return (
        isinstance(module, nn.Linear) and "lm_head" not in name and not any(side % 16 for side in module.weight.shape)
    )
