"""Positions that are scaled by the length of a text (``dynamic``, ``longrope``), for each example of a row separately.

transformers scales all rows of a batch by the longest text in it, or so far: the results for an example would depend on those
next to it and before it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from raysft.models.examples import current

BY_LENGTH = ("dynamic", "longrope")
"""Kinds of positions that depend on the length of a text."""


def scale_each_example(model: nn.Module) -> None:
    """Let a model scale the positions of each example as transformers does for that example alone; others stay as they are."""
    for module in model.modules():
        if getattr(module, "rope_type", None) in BY_LENGTH and not isinstance(module.forward, _Examplewise):
            module.forward = _Examplewise(module)  # type: ignore[method-assign]


class _Examplewise:
    """The forward pass of a rotary embedding: once for examples that fit the model's own positions, and for each longer length."""

    def __init__(self, module: Any) -> None:
        # What transformers wraps around it scales by the longest position, for which it waits.
        self._module, self._forward = module, torch.no_grad()(inspect.unwrap(type(module).forward))
        self._kind: str = module.rope_type
        rope = module.config.rope_parameters
        self._own: int = (
            module.original_max_seq_len if self._kind == "dynamic" else rope["original_max_position_embeddings"]
        )

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Compute what rotates queries and keys.

        Args:
            x: hidden states, for their type and device.
            position_ids: [rows, tokens]; they count up from 0 in each example, or continue from an earlier call.
        """
        examples, own = current(), self._own
        if examples is not None and examples.lengths_of_tokens.numel() == position_ids.numel():
            lengths, known = examples.lengths_of_tokens.reshape(position_ids.shape), sorted(set(examples.lengths))
        else:
            lengths = lengths_of_tokens(position_ids)
            known = lengths.unique().tolist()  # which takes a wait for the GPU
        if self._kind == "longrope":  # all longer ones are scaled alike
            lengths, known = lengths.clamp(max=own + 1), sorted({min(length, own + 1) for length in known})
        found = self._scaled(x, position_ids.where(lengths <= own, 0), own)
        for length in known:
            if length > own:
                chosen = lengths == length
                found = _where(chosen, self._scaled(x, position_ids.where(chosen, 0), length), found)
        return found

    def _scaled(self, x: torch.Tensor, position_ids: torch.Tensor, length: int) -> Any:
        """Call the forward pass as for an example of this many tokens, some of which may be elsewhere."""
        module = self._module
        if length > self._own:
            tokens = torch.tensor(length)  # as a tensor, so that it is rounded as transformers' own
            found, _ = ROPE_INIT_FUNCTIONS[self._kind](module.config, torch.device("cpu"), seq_len=tokens)
            # From memory that is not pinned, a copy would wait for everything that a GPU has yet to compute.
            found = found.pin_memory() if x.is_cuda else found
            module.inv_freq = found.to(x.device, non_blocking=True)
        else:
            module.inv_freq = module.original_inv_freq.to(x.device)
        return self._forward(module, x, position_ids)


def _where(chosen: torch.Tensor, found: Any, otherwise: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(_where(chosen, *pair) for pair in zip(found, otherwise, strict=True))
    return torch.where(chosen[..., None], found, otherwise)


def lengths_of_tokens(position_ids: torch.Tensor) -> torch.Tensor:
    """Return for each token the length of its example, which ends before a position that does not follow.

    >>> lengths_of_tokens(torch.tensor([[0, 1, 2, 0, 1, 0], [7, 8, 0, 0, 1, 2]])).tolist()
    [[3, 3, 3, 2, 2, 1], [9, 9, 1, 3, 3, 3]]
    """
    last = torch.ones_like(position_ids, dtype=torch.bool)
    last[..., :-1] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    tokens = position_ids.shape[-1]
    places = torch.arange(tokens, device=position_ids.device).expand_as(position_ids)
    ends = places.where(last, tokens).flip(-1).cummin(-1).values.flip(-1)
    return position_ids.gather(-1, ends) + 1
