"""A cache of keys and values with room for the tokens to come."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 128
"""Tokens for which a layer makes room at a time."""


class RoomyLayer(DynamicLayer):
    """A layer of the cache that writes new tokens behind the others.

    That of transformers copies all tokens at every step, into new memory: a fifth of the step's time for 64 rows of 120 tokens
    of SmolLM2-135M. The methods of the base class see tensors of the tokens that are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._spaces: list[torch.Tensor] = []
        self._views: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, tokens, size] keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before: Any = (self.keys, self.values)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        # Another method may have replaced the tensors, by some of their rows for instance.
        ours = len(self._views) == 2 and all(one is other for one, other in zip(before, self._views, strict=True))
        if not ours or end > self._spaces[0].shape[-2]:
            self._spaces = [
                _space(old, new, length, end + ROOM)
                for old, new in zip(before, (key_states, value_states), strict=True)
            ]
        for space, new in zip(self._spaces, (key_states, value_states), strict=True):
            space[..., length:end, :] = new
        self._views = tuple(space[..., :end, :] for space in self._spaces)
        self.keys, self.values = self._views
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self._spaces, self._views = [], ()


def _space(old: torch.Tensor, new: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    rows, heads, _, size = new.shape
    space = new.new_empty(rows, heads, capacity, size)
    if length:
        space[..., :length, :] = old
    return space


def roomy_cache(hf_config: Any) -> DynamicCache:
    """Build an empty cache for a model, from its transformers config; layers with a sliding window stay as they are."""
    cache = DynamicCache(config=hf_config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
