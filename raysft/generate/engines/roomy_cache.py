"""A cache of keys and values with room for the tokens to come, whose rows start separately and leave without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
        self._begin = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, tokens, size] keys and values; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, tokens = self.get_seq_length(), key_states.shape[-2]
        if not self._is_ours() or self._begin + length + tokens > self._spaces[0].shape[-2]:
            before: Any = (self.keys, self.values)
            self._spaces = [
                _space([old] if length else [], new, length, length + tokens + ROOM)
                for old, new in zip(before, (key_states, value_states), strict=True)
            ]
            self._begin = 0
        start = self._begin + length
        for space, new in zip(self._spaces, (key_states, value_states), strict=True):
            space[..., start : start + tokens, :] = new
        self._show(length + tokens)
        return self._views[0], self._views[1]

    def join(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], tokens: int) -> None:
        """Begin with the rows of several tensors, below each other, each with zeros before it up to ``tokens``."""
        self.lazy_initialization(keys[0], values[0])
        self._spaces = [_space(parts, parts[0], tokens, tokens + ROOM) for parts in (keys, values)]
        self._begin = 0
        self._show(tokens)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only, in this order; a row that keeps its place is not copied."""
        if not self._is_ours():
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        used = slice(self._begin, self._begin + length)
        moved = (indices != torch.arange(len(indices))).nonzero()[:, 0]
        for space in self._spaces:
            space[moved, :, used] = space[indices[moved], :, used]
        self._spaces = [space[: len(indices)] for space in self._spaces]
        self._show(length)

    def forget(self, tokens: int) -> None:
        """Forget the first tokens of all rows."""
        if self._is_ours():
            self._begin += tokens
            self._show(self.get_seq_length() - tokens)
        elif self.get_seq_length():
            before: Any = (self.keys, self.values)
            self.keys, self.values = (states[..., tokens:, :] for states in before)

    def _is_ours(self) -> bool:
        """False if another method has replaced the tensors, by some of their rows for instance."""
        now: Any = (self.keys, self.values)
        return len(self._views) == 2 and all(one is other for one, other in zip(now, self._views, strict=True))

    def _show(self, length: int) -> None:
        self._views = tuple(space[..., self._begin : self._begin + length, :] for space in self._spaces)
        self.keys, self.values = self._views


def _space(parts: Sequence[torch.Tensor], like: torch.Tensor, length: int, capacity: int) -> torch.Tensor:
    """Make room for ``capacity`` tokens, the first ``length`` of which are ``parts``, below each other and padded on the left.

    Zeros, not what happened to be in memory: a masked value that is not a number would still reach the result.
    """
    _, heads, _, size = like.shape
    space = like.new_zeros(sum(map(len, parts)) or len(like), heads, capacity, size)
    row = 0
    for part in parts:
        space[row : row + len(part), :, length - part.shape[-2] : length] = part
        row += len(part)
    return space


def roomy_cache(hf_config: Any) -> DynamicCache:
    """Build an empty cache for a model, from its transformers config; layers with a sliding window stay as they are."""
    cache = DynamicCache(config=hf_config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def joined(hf_config: Any, caches: Sequence[DynamicCache], tokens: int) -> DynamicCache:
    """Join caches: their rows below each other, each padded on the left to ``tokens``.

    The caches are emptied layer by layer, so that no more than one layer is there twice.
    """
    whole = roomy_cache(hf_config)
    for index, layer in enumerate(whole.layers):
        parts: list[Any] = [cache.layers[index] for cache in caches]
        keys, values = [part.keys for part in parts], [part.values for part in parts]
        if isinstance(layer, RoomyLayer):
            layer.join(keys, values, tokens)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            kept = min(tokens, layer.sliding_window - 1)
            layer.lazy_initialization(keys[0], values[0])
            layer.keys, layer.values = (_space(states, states[0], kept, kept) for states in (keys, values))
            layer.cumulative_length = tokens
        for part in parts:
            part.reset()
    return whole


def forget(cache: DynamicCache, tokens: int) -> None:
    """Forget the first tokens of all rows, which are padding."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.forget(tokens)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= tokens
            before: Any = (layer.keys, layer.values)
            kept = min(layer.cumulative_length, layer.sliding_window - 1)
            layer.keys, layer.values = (states[..., states.shape[-2] - kept :, :] for states in before)


def token_bytes(cache: Any) -> float:
    """Bytes of the keys and values of one token of one row, in all layers that hold some."""
    states = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return sum(
        each.nbytes / (each.shape[0] * each.shape[-2]) for each in states if each is not None and each.dim() == 4
    )
