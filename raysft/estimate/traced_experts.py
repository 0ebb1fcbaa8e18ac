"""Experts that compute in the kernel of ``model.experts: kt``, without weights and kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from raysft.models.kt_experts import Kept, LayerExperts, rank_in_kernel
from raysft.models.kt_factors import Given


class TracedExperts(LayerExperts):
    """What a trace needs of a layer's experts: the shapes of their results and gradients, which are all that the device has.

    Args:
        chosen: experts of a token.
        recomputes: True if the experts of all layers compute again in the backward pass.
        module: the experts of the layer, with their weights.
        adapters: peft's, of these weights.
    """

    def __init__(self, chosen: int, recomputes: bool, module: Any, adapters: Sequence[Any]) -> None:
        elements = sum(math.prod(weight.shape) for weight in (module.gate_up_proj, module.down_proj))
        super().__init__(None, adapters, Kept(), elements)
        self.recomputes = recomputes
        experts, *sizes = module.down_proj.shape
        self.elements_of_adapter = 3 * experts * rank_in_kernel(adapters) * sum(sizes)
        self.buffers, self.kept = (chosen * bytes_ for bytes_ in kernel_bytes(*module.down_proj.shape[1:]))

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given, keep: bool
    ) -> torch.Tensor:
        return torch.empty_like(hidden)

    def backward(
        self, gradient: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        of_factors = [None if each is None else torch.empty_like(each, dtype=torch.float32) for each in given.factors]
        return torch.empty_like(hidden), torch.empty_like(weights), of_factors


def kernel_bytes(hidden: int, inner: int) -> tuple[float, float]:
    """Return what kt-kernel 0.7.2 needs for a token and one of its experts: buffers, and what it keeps for the backward pass.

    Fitted to measurements of the process, which ``tests/unit/test_estimate_trace.py`` has. All layers share the buffers.

    >>> [round(value) for value in kernel_bytes(hidden=1024, inner=768)]
    [43776, 7117]
    """
    return 22.5 * hidden + 27.0 * inner, 2.3 * hidden + 6.2 * inner


def elements_of_adapters(model: Any) -> int:
    """Return how many weights of adapters the kernel has, of all layers; also without an adapter it has a small one."""
    layers = [module.experts_of_layer for module in model.modules() if hasattr(module, "experts_of_layer")]
    return sum(layer.elements_of_adapter for layer in layers)


def bytes_in_kernel(model: Any) -> float:
    """Return the bytes in the kernel for each token of a microbatch, besides the experts' weights."""
    layers = [module.experts_of_layer for module in model.modules() if hasattr(module, "experts_of_layer")]
    if not layers:
        return 0.0
    kept = [layer.kept for layer in layers]
    return max(layer.buffers for layer in layers) + (max(kept) if layers[0].recomputes else sum(kept))
