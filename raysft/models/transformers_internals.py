"""The private parts of transformers that raysft uses, in one place; ``tests/contracts/test_transformers.py`` checks that they
exist. Those of continuous batching are in ``generate/engines/continuous_internals.py``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any


def attention_implementation(model: Any) -> str:
    """Return the name of the attention function that a model uses; for a vision-language model, that of its text part."""
    return str(model.config.get_text_config()._attn_implementation)


class _WithKernel:
    """A layer whose config names another attention function."""

    def __init__(self, layer: Any, kernel: str) -> None:
        self._layer, self._kernel = layer, kernel

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            return self._kernel
        found = getattr(self._layer, name)
        return _WithKernel(found, self._kernel) if name == "config" else found


def flash_attention(
    layer: Any, kernel: str, query: Any, key: Any, value: Any, ends: Any, longest: int, **options: Any
) -> Any:
    """Compute FlashAttention inside each of the examples that follow each other in one row.

    Args:
        layer: the layer that asks.
        kernel: ``flash_attention_2`` or a later one.
        query: [1, heads, tokens, size].
        key: [1, key heads, tokens, size].
        value: as ``key``, perhaps of another size.
        ends: int32 [examples + 1] 0, and where each example ends.
        longest: tokens of the longest example.
        options: what transformers' function takes besides.

    Returns:
        [1, tokens, heads, size].
    """
    from transformers.integrations.flash_attention import flash_attention_forward

    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    options = {**options, **bounds, "is_causal": True}
    return flash_attention_forward(_WithKernel(layer, kernel), query, key, value, None, **options)[0]  # pyright: ignore


def can_set_attention(model: Any) -> bool:
    """Return True if a model's attention function can be replaced."""
    return bool(model._can_set_attn_implementation())


def supports_flash_attention(model: Any) -> bool:
    """Return True if a model passes on all that FlashAttention needs, positions among it."""
    return bool(model._supports_flash_attn)


def passes_window(model: Any) -> bool:
    """Return True if the layers of a model's text tell their attention function how many tokens they attend to; some leave that to
    the mask alone (Qwen2-MoE, Phi-3.5-MoE)."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    sources = [_source_of(kind.forward) for kind in {type(each) for each in decoder.modules()}]
    asking = [each for each in sources if "attention_interface(" in each]
    return bool(asking) and all("sliding_window=" in each for each in asking)


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""  # it was made while the program ran


def computes_attention(model_class: Any, kernel: str) -> bool:
    """Return True if the models of a class compute attention with a kernel of transformers (``sdpa``, ``flash_attention_2`` …)."""
    if kernel.startswith("flash"):
        compatible = model_class._compatible_flash_implementations
        return bool(model_class._supports_flash_attn) and (compatible is None or kernel in compatible)
    supported = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    return kernel not in supported or bool(getattr(model_class, supported[kernel]))


def supports_registered_attention(model_class: Any) -> bool:
    """Return True if the models of a class take any attention function of transformers' registry, rather than only an eager one."""
    return bool(model_class._supports_attention_backend and model_class._supports_sdpa)


@contextmanager
def known_examples(several: bool) -> Iterator[None]:
    """Tell transformers whether a row has several examples, for masks that keep them apart; else it asks the device, and waits."""
    import torch
    from transformers import masking_utils

    def known(position_ids: Any) -> Any:
        if not several:
            return None
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)

    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = known
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def recomputation_of(layer: Any) -> Any:
    """Return what computes a layer's ``forward`` so that the backward pass computes it again; None if nothing does."""
    recomputes = getattr(layer, "gradient_checkpointing", False) and layer.training
    return getattr(layer, "_gradient_checkpointing_func", None) if recomputes else None


def without_recomputation(layer: Any) -> Any:
    """Return a layer's ``forward`` without the recomputation that transformers adds to it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    kind = type(layer)
    return (
        MethodType(kind.forward.__wrapped__, layer) if isinstance(layer, GradientCheckpointingLayer) else layer.forward
    )


def recomputes_itself(layer: Any) -> bool:
    """Return True for a layer that is computed again in the backward pass, or not, by its own flag."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(layer, GradientCheckpointingLayer)


def wrap_recomputation(layer: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the function that computes a layer so that its backward pass can compute it again; the layer has one already."""
    layer._gradient_checkpointing_func = wrap(layer._gradient_checkpointing_func)


def is_recurrent(model_class: Any) -> bool:
    """Return True if the models of a class keep a state that is not a cache of keys and values."""
    return bool(model_class._is_stateful)


def recorded_outputs(module: Any) -> dict[str, Any]:
    """Return the classes of the modules that give each additional output of a model (``router_logits`` …)."""
    return getattr(module, "_can_record_outputs", None) or {}


def expert_modules(model: Any) -> list[Any]:
    """Return the modules that hold all experts of a layer in two weights, ``gate_up_proj`` and ``down_proj``, in order."""
    return [each for each in model.modules() if hasattr(each, "_apply_gate") and hasattr(each, "down_proj")]


def is_swiglu(experts: Any) -> bool:
    """Return True if a module of ``expert_modules`` computes ``down(silu(gate) · up)`` and nothing else, gates first."""
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import _default_apply_gate

    plain = experts.has_gate and experts.is_concatenated
    other = experts.has_bias or experts.is_transposed or experts.has_post_expert_norm
    silu = type(getattr(experts, "act_fn", None)) is type(ACT2FN["silu"])
    return bool(plain and not other and type(experts)._apply_gate is _default_apply_gate and silu)


def apply_gate(experts: Any, states: Any) -> Any:
    """Return what experts make of both halves of their first projection."""
    return experts._apply_gate(states)


def weight_conversions(model: Any) -> Any:
    """Return how transformers renames and merges the weights of a checkpoint for a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def keep_used_conversions(model: Any) -> None:
    """Let a model be saved with the names that it was loaded from.

    With ZeRO-3, transformers also keeps the conversions that changed no name, and would revert them when it saves.
    """
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [each for each in conversions if each.was_used()]


def forget_quantizer(model: Any) -> None:
    """Let a model that was dequantized while it was loaded be saved as a plain one."""
    del model.config.quantization_config
    model.hf_quantizer = None


def tokenizer_config(model: str) -> dict[str, Any]:
    """Return the content of a model's ``tokenizer_config.json``."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    return get_tokenizer_config(model)


def compile_chat_template(template: str) -> None:
    """Compile a chat template as ``render_chat_template`` does.

    Raises:
        jinja2.TemplateSyntaxError: it is not valid Jinja.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    _compile_jinja_template(template)


def render_chat_template(**arguments: Any) -> Any:
    """Render conversations as ``apply_chat_template`` does; return their texts and, if asked for, the spans of the answers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template(**arguments)


def kept_in_float32(model: Any, dtype: str) -> list[str]:
    """Return patterns of the weights that stay in float32 when a model is loaded in a data type, as some routers do."""
    import torch

    return list(model._get_dtype_plan(getattr(torch, dtype)))
