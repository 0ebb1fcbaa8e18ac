"""Draws that belong to a prompt, whatever else is in its batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria


def choose_tokens(
    scores: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Sample a token for each row with a given random number, over what temperature, top-k and top-p leave.

    Args:
        scores: [rows, vocabulary] logits.
        uniforms: [rows] numbers in [0, 1).
        top_k: most probable tokens to keep; 0 keeps all.
        top_p: of these, the most probable that together have this probability; the first one always.

    Returns:
        [rows] token ids.

    >>> choose_tokens(torch.tensor([[0.0, 9.0, 8.9]]), torch.tensor([0.99]), temperature=1.0, top_k=2, top_p=1.0)
    tensor([2])
    """
    count = min(top_k, scores.shape[-1]) if top_k else scores.shape[-1]
    best, tokens = torch.topk(scores.float() / temperature, count, dim=-1)
    probability = torch.softmax(best.double(), dim=-1)
    before = probability.cumsum(-1) - probability
    probability = probability.masked_fill(before >= top_p, 0.0)
    # In the order of the vocabulary, so that two tokens whose logits are nearly one change places in no draw.
    tokens, order = tokens.sort(dim=-1)
    reached = probability.gather(-1, order).cumsum(-1)
    point = uniforms.double()[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, point, right=True).clamp(max=count - 1)
    return tokens.gather(-1, chosen)[:, 0]


def uniform_numbers(seed: int, id: str, count: int) -> torch.Tensor:
    """[count] numbers in [0, 1) that belong to a seed and a prompt, and to nothing else."""
    digest = hashlib.sha256(f"{seed}/{id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator)


class RowSampling(LogitsProcessor):
    """Leaves each row the one token that its random number of this step chooses."""

    def __init__(self, settings: Any, uniforms: torch.Tensor, prompt_length: int) -> None:
        self._settings, self._uniforms, self._prompt_length = settings, uniforms, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = self._uniforms[:, input_ids.shape[1] - self._prompt_length]
        settings = self._settings
        tokens = choose_tokens(scores, numbers, settings.temperature, settings.top_k, settings.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class RowLimits(StoppingCriteria):
    """Ends a row at its own number of new tokens."""

    def __init__(self, limits: torch.Tensor, prompt_length: int) -> None:
        self._limits, self._prompt_length = limits, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        # A beam search holds several beams of each row.
        limits = self._limits.repeat_interleave(input_ids.shape[0] // len(self._limits))
        return input_ids.shape[1] - self._prompt_length >= limits
