"""Activations by formula, for models that cannot be traced. Pure.

For a decoder as Llama's, with attention kernels that keep no matrix of tokens × tokens, as the layers are written in transformers:
per token and layer two norms (in 16 bits 4 + 2 + 2 bytes per element: the float32 input, the scaled input, and the output; in
float32 3 × 4), query, key, value and output of attention, four tensors of the MLP, and one float32 for each head. With
recomputation each layer keeps its input alone. The logits of a chunk exist in the model's type, in float32, as log-probabilities,
and as gradients in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raysft.estimate.sizes import Activations, Layers, Line, LossBytes


@dataclass(frozen=True)
class Decoder:
    """Dimensions of a decoder."""

    layers: int
    hidden: int
    feed_forward: int
    """In a mixture of experts, of those together that compute a token."""
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def of(cls, hf_config: Any) -> Decoder:
        """Read them from a model's config, by the names that most models of transformers have."""
        text = hf_config.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        feed_forward = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        if chosen := getattr(text, "num_experts_per_tok", None):
            own = getattr(text, "moe_intermediate_size", None) or feed_forward
            shared = getattr(text, "shared_expert_intermediate_size", None)
            feed_forward = chosen * own + (shared or own * (getattr(text, "n_shared_experts", None) or 0))
        return cls(text.num_hidden_layers, text.hidden_size, feed_forward, heads, key_heads, size, text.vocab_size)


def by_formula(
    decoder: Decoder, width: int, tokens: int, loss_share: float, recomputed: int, chunk: int, rows: tuple[int, ...]
) -> Activations:
    """Compute the activations.

    Args:
        decoder: dimensions of the model.
        width: bytes of a number that the layers compute with.
        tokens: tokens of a row.
        loss_share: share of them with a loss.
        recomputed: number of layers that are computed again; the first ones.
        chunk: most loss tokens whose logits exist at the same time.
        rows: numbers of rows of a microbatch for which to compute the loss.
    """
    h, f = decoder.hidden, decoder.feed_forward
    norm = 8 * h if width == 2 else 12 * h
    attention = width * 2 * decoder.head_size * (decoder.heads + decoder.key_heads) + 4 * decoder.heads
    whole = float(tokens * (2 * norm + attention + width * 4 * f))
    gradients = float(tokens * width * (3 * f + 2 * h))
    layers = tuple(
        Layers(
            count,
            Line(0.0, float(tokens * width * h) if again else whole),
            Line(0.0, whole),
            Line(float(width * h * f), gradients + (whole if again else 0.0)),
            again,
        )
        for count, again in ((recomputed, True), (decoder.layers - recomputed, False))
        if count
    )
    loss = {}
    for each in rows:
        count = max(1.0, each * tokens * loss_share)
        at_once = min(count, chunk)
        hidden = 2.0 * each * tokens * width * h
        loss[each] = LossBytes(hidden + at_once * decoder.vocabulary * (2 * width + 12), hidden)
    embedded = Line(0.0, float(tokens * width * (h + 2 * decoder.head_size)))
    tail = Line(0.0, embedded.per_row + layers[0].saved.per_row + layers[0].backward.per_row)
    return Activations(tokens, embedded, layers, loss, tail, traced=False)
