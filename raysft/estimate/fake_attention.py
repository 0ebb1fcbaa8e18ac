"""Attention kernels in an estimate: their inputs and outputs have the shapes and the lifetimes of the real ones.

FlashAttention's kernels (that of its package, and those in torch's SDPA for CPUs and GPUs) keep query, key, value, output, and one
float32 per query and head. With a mask, as for packed rows in plain SDPA, keys and values are repeated for all heads, and the mask
is kept as numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function

NAME = "raysft_fake"
"""The name of the attention function in transformers."""


class _Kernel(Function):
    """[rows, heads, tokens, size] of query, key and value → [rows, tokens, heads, size]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked: bool) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1])
        sums = query.new_empty(rows, heads, tokens, dtype=torch.float32)
        mask = query.new_empty(rows, 1, tokens, key.shape[2]) if masked else sums
        ctx.save_for_backward(query, key, value, out, sums, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def fake_attention(masked: bool, copies: bool, drops: bool) -> Callable[..., Any]:
    """Return an attention function as transformers' ``AttentionInterface`` has it.

    Args:
        masked: the kernel gets a mask.
        copies: the outputs of all examples are joined to a new tensor, as in ``attention.examplewise``.
        drops: the kernel knows dropout, as those of GPUs do; torch's for CPUs does not, and makes the matrix of all weights then.
    """

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if options.get("dropout") and not drops:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            mask = query.new_empty(query.shape[0], 1, query.shape[2], key.shape[2]) if masked else None
            out, _ = sdpa_attention_forward(module, query, key, value, mask, options["dropout"], is_causal=not masked)
            return (torch.cat([out]) if copies else out), None
        if masked:
            groups = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (key, value))
        out = _Kernel.apply(query, key, value, masked)
        return (torch.cat([out]) if copies else out), None

    return attention
