"""Layers that keep only their inputs and are recomputed in the backward pass: ``train.gradient_checkpointing``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.autograd.graph import save_on_cpu

from raysft.errors import RequestError
from raysft.models.attention import without_adapters
from raysft.models.decoder_layers import decoder_layers
from raysft.models.model_class import sees_images
from raysft.models.transformers_internals import recomputes_itself, wrap_recomputation


def recompute_layers(
    model: Any,
    first: int | None = None,
    on_cpu: bool = False,
    contexts: Callable[[], tuple[Any, Any]] | None = None,
) -> None:
    """Make a model, with its adapters, compute its layers again in the backward pass.

    transformers then lets all embeddings have gradients, which only another kind of recomputation needs. Those of image patches
    would send a frozen tower through a backward pass for nothing.

    Args:
        model: a transformers or peft model.
        first: number of the decoder's first layers to compute again; None for all. When their backward pass comes, the last
            layers have released what they keep.
        on_cpu: keep the inputs of these layers in the node's memory meanwhile.
        contexts: makes the contexts in which a layer is computed, and computed again.

    Raises:
        RequestError: the model does not let each layer be computed again by itself, or has fewer layers.
    """
    plain = without_adapters(model)
    layers = _layers(plain, first, on_cpu) if first is not None or on_cpu else []
    plain.activation_checkpointing_enable({"use_reentrant": False, **({"context_fn": contexts} if contexts else {})})
    if sees_images(plain):
        plain.disable_input_require_grads()
    for layer in [] if first is None else layers[first:]:
        layer.gradient_checkpointing = False
    for layer in layers[:first] if on_cpu else ():
        wrap_recomputation(layer, _with_inputs_on_cpu)


def is_recomputed(layer: Any) -> bool:
    """Return True for a layer of the decoder that is computed again."""
    return bool(getattr(layer, "gradient_checkpointing", False))


def _layers(model: Any, first: int | None, on_cpu: bool) -> list[Any]:
    asked = "train.offload.activations=cpu" if on_cpu else f"train.recompute_layers={first}"
    prefix, count = decoder_layers(model)
    layers = list(model.get_submodule(prefix))
    if first is not None and first > count:
        raise RequestError(f"train.recompute_layers={first}, but the model has {count} layers; use at most {count}")
    if not all(map(recomputes_itself, layers)):
        raise RequestError(
            f"{asked} needs layers that are checkpointed one by one, but those of {type(model).__name__} are not; remove it"
        )
    return layers


def _with_inputs_on_cpu(recomputed: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call keep its inputs on the CPU; what it keeps inside is not kept at all, since it is computed again."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=True):
            return recomputed(*args, **kwargs)

    return call
