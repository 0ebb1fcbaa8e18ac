"""Matrix multiplication in 8-bit floats (FP8), with torchao."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import torch
from torch import nn

from raysft.errors import RequestError
from raysft.models.attention import without_adapters

MIN_CAPABILITY = (8, 9)
"""Lowest compute capability of GPUs that multiply 8-bit floats: Ada; Hopper is (9, 0)."""


def check_fp8(device: torch.device) -> None:
    """Check that the device can multiply 8-bit floats.

    Raises:
        RequestError: it would only emulate them, or torchao is not installed.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device) if capability else "a CPU"
        raise RequestError(
            "train.fp8=torchao needs a GPU of compute capability 8.9 or higher (Ada, Hopper or later), but a worker has "
            f"{name}; set train.fp8=off"
        )
    if importlib.util.find_spec("torchao") is None:
        raise RequestError(
            "train.fp8=torchao needs the package torchao, which is not installed; "
            "run pip install 'raysft[fp8]' on every node"
        )


def use_fp8(model: nn.Module, device: torch.device) -> None:
    """Convert the linear layers of a model, except the output head, which is computed in chunks.

    Raises:
        RequestError: the device cannot do it, or no layer was converted.
    """
    check_fp8(device)
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    # Weight gradients are sums over tokens; GPUs only take multiples of 16 tokens, and a microbatch has multiples of 8.
    settings = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)
    head = without_adapters(model).get_output_embeddings()
    apart = set(head.modules()) if isinstance(head, nn.Module) else set()
    convert_to_float8_training(
        model,
        config=settings,
        module_filter_fn=lambda module, name: module not in apart and is_convertible(module),
    )
    if not any("Float8" in type(module).__name__ for module in model.modules()):
        raise RequestError("train.fp8=torchao cannot convert any layer of this model; set train.fp8=off")


def is_convertible(module: nn.Module) -> bool:
    """Return True for linear layers whose sides are multiples of 16."""
    # Not judged by the weight's shape: where ZeRO-3 has partitioned it, that is (0,).
    sides = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else ()
    return bool(sides) and not any(side % 16 for side in sides)
