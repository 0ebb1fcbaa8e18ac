"""Leave finished rows out of a batch, so that a step computes only those that still grow, with a cache that is not copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from raysft.generate.engines.roomy_cache import roomy_cache

SHARE = 8
"""Rows are left out as soon as one in so many has finished: that costs about as much as half a step."""
TRIAL_TOKENS = 8
"""Tokens of the prompts that test whether a model allows it."""


class EnoughDone(StoppingCriteria):
    """Interrupt the generation of a batch when enough of its rows have finished.

    Args:
        stops: tokens that end a row.
        limits: [rows] most new tokens of each row.
        prompt_length: tokens of each row's prompt, with its padding.
    """

    def __init__(self, stops: Sequence[int], limits: torch.Tensor, prompt_length: int) -> None:
        self._stops = torch.tensor(list(stops), dtype=torch.long)
        self._limits, self._prompt_length = limits, prompt_length
        self.done = torch.zeros(len(limits), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        # A finished row is padded with tokens that need not be stop tokens: it stays finished.
        self.done |= torch.isin(input_ids[:, -1], self._stops)
        self.done |= input_ids.shape[1] - self._prompt_length >= self._limits
        enough = int(self.done.sum()) * SHARE >= len(self.done)
        return torch.ones_like(self.done) if enough else self.done


def grow(
    model: Any,
    rows: torch.Tensor,
    mask: torch.Tensor,
    limits: torch.Tensor,
    stops: Sequence[int],
    arguments: Callable[[list[int], int], dict[str, Any]],
) -> list[list[int]]:
    """Generate a batch, and leave out rows once they have finished.

    Args:
        model: one for which ``can_shrink`` holds.
        rows: [rows, tokens] prompts, padded on the left.
        mask: as ``rows``; 0 for padding.
        limits: [rows] most new tokens of each row.
        stops: tokens that end a row.
        arguments: returns further arguments of ``model.generate``, for the rows that are left and the new tokens that may follow.

    Returns:
        New tokens of each row; padding may follow a row's end.
    """
    prompt_length, cache = rows.shape[1], roomy_cache(model.config)
    written: list[list[int]] = [[] for _ in limits]
    left = torch.arange(len(limits))
    while len(left):
        done = EnoughDone(stops, limits[left], prompt_length)
        more = int(limits[left].max()) - (rows.shape[1] - prompt_length)
        output = model.generate(
            input_ids=rows,
            attention_mask=mask,
            past_key_values=cache,
            stopping_criteria=StoppingCriteriaList([done]),
            **arguments(left.tolist(), more),
        )
        rows, cache, grows = output.sequences, output.past_key_values, (~done.done).nonzero()[:, 0]
        for index, tokens in zip(left.tolist(), rows[:, prompt_length:].tolist(), strict=True):
            written[index] = tokens
        mask = torch.cat([mask, mask.new_ones(len(mask), rows.shape[1] - mask.shape[1])], dim=1)[grows]
        left, rows = left[grows], rows[grows]
        cache.batch_select_indices(grows)
    return written


@torch.inference_mode()
def can_shrink(model: Any, padding: int) -> bool:
    """Test whether a model generates the same tokens after a row was left out; return True if it does.

    The cache must consist of keys and values alone; states of other kinds (recurrent, quantized) are not indexed by row.
    """
    prompt = torch.arange(2 * TRIAL_TOKENS).reshape(2, -1) % model.config.get_text_config().vocab_size
    prompt[0, 0] = padding
    mask = (torch.arange(2 * TRIAL_TOKENS).reshape(2, -1) > 0).long()
    whole = trial(model, prompt, mask, 4, padding)
    # Its own cache; one for which other layers are needed is not replaced.
    layers = getattr(whole.past_key_values, "layers", ())
    known = {type(layer) for layer in layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    if type(whole.past_key_values) is not DynamicCache or not known:
        return False
    cache = roomy_cache(model.config)
    if len(cache.layers) != len(layers):
        return False
    half = trial(model, prompt, mask, 2, padding, cache)
    cache.batch_select_indices(torch.tensor([1]))
    rest = trial(model, half.sequences[1:], torch.ones(1, TRIAL_TOKENS + 2).long(), 2, padding, cache)
    expected, found = torch.cat(whole.logits[2:])[1::2], torch.cat(rest.logits)
    return bool(((expected - found).abs() <= 1e-2 * expected.std(-1, keepdim=True) + 1e-6).all())


def trial(model: Any, rows: torch.Tensor, mask: torch.Tensor, new_tokens: int, padding: int, cache: Any = None) -> Any:
    """Generate so many tokens greedily, whatever they are; returns the output of ``model.generate``, with logits."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=padding,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    started = {} if cache is None else {"past_key_values": cache}
    return model.generate(input_ids=rows, attention_mask=mask, generation_config=settings, **started)
