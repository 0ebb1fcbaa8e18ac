"""How a prompt and what follows it share the positions of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def positions_of(description: Any) -> int | None:
    """How many positions a model has, by its transformers config; None where it has no bound."""
    positions = getattr(description.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 1 else None


def scale_turn(description: Any) -> int | None:
    """Positions from which on a model scales all of them in another way, in the whole batch, by its longest row (longrope)."""
    text = description.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)


def fit(prompt: Sequence[int], positions: int | None, max_new_tokens: int) -> Sequence[int]:
    """The prompt, or its tail where prompt and answer are more than the model has positions for.

    >>> fit([1, 2, 3, 4, 5], positions=4, max_new_tokens=9)
    [4, 5]
    """
    if positions is None:
        return prompt
    # At most half of the positions are given to the answer at the cost of the prompt.
    room = positions - min(max_new_tokens, positions // 2)
    return prompt[-room:] if len(prompt) > room else prompt


def limit(prompt: Sequence[int], positions: int | None, max_new_tokens: int) -> int:
    """Tokens that may follow a prompt that fits.

    >>> limit([4, 5], positions=4, max_new_tokens=9)
    2
    """
    return max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
