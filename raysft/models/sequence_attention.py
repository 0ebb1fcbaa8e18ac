"""Attention over rows whose tokens are spread over several workers: ``scaling.sequence_parallel`` (Ulysses, Jacobs et al. 2023).

Outside attention, each worker of a group computes a slice of the tokens. For attention, the workers exchange queries, keys and
values, so that each has all tokens for part of the heads, and afterwards they exchange the results back. So examples are kept
apart exactly as on one worker, by the lengths of all examples in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from raysft.config import Config
from raysft.errors import RunFailed
from raysft.models.attention import (
    SEQUENCE,
    NoPositions,
    by_example,
    example_lengths,
    is_plain,
    without_adapters,
)
from raysft.models.examples import Slice, current
from raysft.models.transformers_internals import (
    attention_implementation,
    can_set_attention,
    flash_attention,
    supports_flash_attention,
)

REMEDY = "set scaling.sequence_parallel=1, or use another model"


def use_sequence(model: Any, config: Config) -> None:
    """Make a model exchange its tokens with other workers in attention.

    Raises:
        RunFailed: the model's attention cannot be replaced, or does more than attend to what precedes in the example.
    """
    from transformers import AttentionInterface

    own = attention_implementation(model)
    flash = own.startswith("flash") and supports_flash_attention(model) and can_set_attention(model)
    if not (flash or is_plain(model, config.data.sequence_length)):
        raise RunFailed(
            f"scaling.sequence_parallel={config.scaling.sequence_parallel} needs plain causal attention, but that of "
            f"{type(model).__name__} ({own}) is another one; {REMEDY}"
        )
    # A name with "flash" would make transformers prepare FlashAttention's own arguments.
    name = SEQUENCE + own.replace("flash_attention", "varlen")
    AttentionInterface.register(name, partial(sequence_attention, kernel=own))
    _set(model, name)


@contextmanager
def with_attention(model: Any, name: str) -> Iterator[None]:
    """Let a model compute with another attention function in the block."""
    model = without_adapters(model)
    before = attention_implementation(model)
    _set(model, name)
    try:
        yield
    finally:
        _set(model, before)


def own_kernel(model: Any) -> str:
    """Return the name of the attention function that a model had before ``use_sequence``."""
    return attention_implementation(model).removeprefix(SEQUENCE).replace("varlen", "flash_attention")


def _set(model: Any, name: str) -> None:
    text_alone = model.config.get_text_config() is model.config
    model.set_attn_implementation(name if text_alone else {"text_config": name})


def sequence_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    kernel: str = "sdpa",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers' ``AttentionInterface`` has it.

    Args:
        module: the calling layer.
        query: [1, heads, tokens of the slice, size].
        key: [1, key heads, tokens of the slice, size].
        value: as ``key``, perhaps of another size.
        attention_mask: not used.
        position_ids: [1, tokens]; needed where all tokens are here.
        kernel: name of the function that computes the attention of a part of the heads.
        options: what that function takes besides.

    Returns:
        [1, tokens of the slice, heads, size], and no weights.

    Raises:
        RunFailed: the layer's attention needs more than queries, keys and values, or its heads cannot be divided.
    """
    if more := next((name for name in ("s_aux", "position_bias") if options.get(name) is not None), None):
        raise RunFailed(
            f"{type(module).__name__} has {'attention sinks' if more == 's_aux' else 'biases of its attention'}, which workers "
            f"cannot exchange for scaling.sequence_parallel; {REMEDY}"
        )
    examples = current()
    if examples is None or examples.part is None:
        if position_ids is None or position_ids.shape[-1] != query.shape[2]:
            raise NoPositions(f"{type(module).__name__} does not pass positions on, so examples cannot be told apart")
        return _attend(module, kernel, query, key, value, example_lengths(position_ids), options), None
    part = examples.part
    if query.shape[1] % part.workers:
        raise RunFailed(
            f"scaling.sequence_parallel={part.workers} divides query heads, of which {type(module).__name__} has {query.shape[1]}; "
            f"use a divisor of {query.shape[1]}"
        )
    repeated = part.workers // math.gcd(key.shape[1], part.workers)
    if repeated > 1:
        key, value = (states.repeat_interleave(repeated, dim=1) for states in (key, value))
    query, key, value = (_to_heads(states, part) for states in (query, key, value))
    return _to_tokens(_attend(module, kernel, query, key, value, examples.lengths, options), part), None


def _attend(
    module: torch.nn.Module,
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    options: dict[str, Any],
) -> torch.Tensor:
    """Attend inside each example, with all tokens of some heads; returns [1, tokens, heads, size]."""
    layer: Any = _Layer(module, query.shape[1] // key.shape[1])
    if kernel.startswith("flash"):
        ends = options.get("cu_seq_lens_q")  # of whole rows, on the device since before the pass
        if ends is None:
            ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
        return flash_attention(layer, kernel, query, key, value, ends, max(lengths), **options)
    return by_example(layer, query, key, value, lengths, **options)


class _Layer:
    """A layer as attention functions see it, with another number of heads."""

    is_causal = True

    def __init__(self, layer: torch.nn.Module, groups: int) -> None:
        self._layer, self.num_key_value_groups = layer, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _to_heads(states: torch.Tensor, part: Slice) -> torch.Tensor:
    """Exchange [1, heads, tokens of the slice, size] for [1, a part of the heads, all tokens, size]."""
    _, heads, tokens, size = states.shape
    parts = states.reshape(part.workers, heads // part.workers, tokens, size)
    received = _Exchange.apply(parts, part.processes)
    return received.transpose(0, 1).reshape(1, heads // part.workers, part.workers * tokens, size)


def _to_tokens(states: torch.Tensor, part: Slice) -> torch.Tensor:
    """Exchange [1, all tokens, a part of the heads, size] for [1, tokens of the slice, heads, size]."""
    _, tokens, heads, size = states.shape
    parts = states.reshape(part.workers, tokens // part.workers, heads, size)
    received = _Exchange.apply(parts, part.processes)
    return received.transpose(0, 1).reshape(1, tokens // part.workers, part.workers * heads, size)


class _Exchange(torch.autograd.Function):
    """Send the i-th of equal parts to the i-th worker, and receive one from each; gradients go the same way back."""

    @staticmethod
    def forward(context: Any, parts: torch.Tensor, processes: Any) -> torch.Tensor:
        context.processes = processes
        return _exchanged(parts, processes)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return _exchanged(gradients[0], context.processes), None


def _exchanged(parts: torch.Tensor, processes: Any) -> torch.Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=processes)
    return received
