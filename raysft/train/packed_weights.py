"""4-bit weights that ZeRO-3 partitions: a layer's weights exist while it computes, but not between forward and backward."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn


def release_after_forward(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model from holding the weights that ZeRO-3 gathered for their forward pass.

    bitsandbytes keeps a view of the weight for the backward pass, and with it everything that was gathered: each worker would
    hold the packed weights of the whole model at the end of a forward pass. ZeRO-3 gathers them again for the backward pass.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    return _Product.apply(inputs, module)  # pyright: ignore[reportReturnType]  # as torch declares it


class _Product(torch.autograd.Function):
    """The product with a frozen 4-bit weight, which is read from its layer again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, module: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.module, ctx.dtype = module, inputs.dtype
        return type(module).forward(module, inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        from bitsandbytes.functional import dequantize_4bit

        weight, dtype = ctx.module.weight, ctx.module.compute_dtype or gradient.dtype
        whole = dequantize_4bit(weight.data, weight.quant_state).to(dtype)
        return (gradient.to(dtype) @ whole).to(ctx.dtype), None
