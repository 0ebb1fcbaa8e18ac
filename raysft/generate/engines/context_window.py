"""Divide a model's positions between a prompt and its completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def longrope_threshold(hf_config: Any) -> int | None:
    """Row length beyond which longrope scales the positions of the whole batch differently; None for other models."""
    text = hf_config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)


def fit(prompt: Sequence[int], positions: int | None, max_new_tokens: int) -> Sequence[int]:
    """Return the prompt, or its tail if prompt and completion exceed the model's positions.

    >>> fit([1, 2, 3, 4, 5], positions=4, max_new_tokens=9)
    [4, 5]
    """
    if positions is None:
        return prompt
    # The completion takes at most half of the positions from the prompt.
    available = positions - min(max_new_tokens, positions // 2)
    return prompt[-available:] if len(prompt) > available else prompt


def limit(prompt: Sequence[int], positions: int | None, max_new_tokens: int) -> int:
    """Number of tokens that may follow a prompt that fits.

    >>> limit([4, 5], positions=4, max_new_tokens=9)
    2
    """
    return max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
