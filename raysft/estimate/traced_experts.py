"""Experts that compute in the kernel of ``model.experts: kt``, without weights and kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from raysft.models.kt_experts import Kept, LayerExperts
from raysft.models.kt_factors import Given


class TracedExperts(LayerExperts):
    """What a trace needs of a layer's experts: the shapes of their results and gradients, which are all that the device has.

    Args:
        module: the experts of a layer, with their weights.
        adapters: peft's, of these weights.
    """

    def __init__(self, module: Any, adapters: Sequence[Any]) -> None:
        elements = sum(math.prod(weight.shape) for weight in (module.gate_up_proj, module.down_proj))
        super().__init__(None, adapters, Kept(), elements)

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given, keep: bool
    ) -> torch.Tensor:
        return torch.empty_like(hidden)

    def backward(
        self, gradient: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        of_factors = [None if each is None else torch.empty_like(each, dtype=torch.float32) for each in given.factors]
        return torch.empty_like(hidden), torch.empty_like(weights), of_factors
