"""The experts of a layer in an estimate: the tensors of transformers' grouped product, regardless of what the routers chose.

torch's own grouped product has no fake for float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from raysft.models.transformers_internals import apply_gate

NAME = "raysft_fake"
"""The name of the experts' function in transformers."""


class _Product(Function):
    """[tokens, inputs] and [experts, inputs, outputs] → [tokens, outputs]."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        return states.new_empty(states.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        needed = ctx.needs_input_grad
        return tuple(
            torch.empty_like(each) if need else None for each, need in zip(ctx.saved_tensors, needed, strict=True)
        )


def fake_experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """An experts' function as transformers' ``ExpertsInterface`` has it, with the arguments of ``grouped_mm_experts_forward``."""
    count = chosen.size(-1)
    experts, order = torch.sort(chosen.reshape(-1))
    states, shares = hidden[order // count], weights.reshape(-1)[order]
    states = _linear(module, states, "gate_up_proj" if module.has_gate else "up_proj", experts)
    states = apply_gate(module, states) if module.has_gate else module.act_fn(states)
    states = _linear(module, states, "down_proj", experts)
    if module.has_post_expert_norm:
        states = module.post_expert_norm(states)
    states = (states * shares.unsqueeze(-1))[torch.argsort(order)]
    return states.view(-1, count, states.shape[-1]).sum(1).to(hidden.dtype)


def _linear(module: Any, states: torch.Tensor, name: str, experts: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    out = _Product.apply(states, weight if module.is_transposed else weight.transpose(-2, -1))
    return out.add_(getattr(module, f"{name}_bias")[experts]) if module.has_bias else out
