"""Layers that keep their inputs alone and are computed again in the backward pass: ``train.gradient_checkpointing``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raysft.models.attention import without_adapters
from raysft.models.model_class import sees_images


def recompute_layers(model: Any, contexts: Callable[[], tuple[Any, Any]] | None = None) -> None:
    """Make a model, with its adapters, compute its layers again in the backward pass.

    transformers then lets all embeddings have gradients, which only another kind of recomputation needs. Those of the patches of
    images would send a frozen tower through a backward pass for nothing.
    """
    plain = without_adapters(model)
    plain.gradient_checkpointing_enable({"use_reentrant": False, **({"context_fn": contexts} if contexts else {})})
    if sees_images(plain):
        plain.disable_input_require_grads()
