"""Attention kernels, and attention that keeps the examples of a packed row apart."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from raysft.config import Config
from raysft.errors import RequestError, RunFailed
from raysft.models.examples import known_lengths
from raysft.models.media_inputs import kinds_argument
from raysft.models.model_class import class_of
from raysft.models.transformers_internals import (
    attention_implementation,
    can_set_attention,
    computes_attention,
    passes_window,
    supports_flash_attention,
)

EXAMPLEWISE = "examplewise_sdpa"
"""The name of ``examplewise`` in transformers."""
WITH_SINKS = "examplewise_with_sinks"
"""The name of ``examplewise_with_sinks`` in transformers."""
SEQUENCE = "sequence_"
"""Prefix of the names of attention functions that exchange tokens with other workers (``sequence_attention``)."""
OWN = ("examplewise_", SEQUENCE)
"""Prefix of the names of raysft's attention functions."""


FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn", range(8, 99), "Ampere or later"),
    "flash_attention_3": ("flash_attn_interface", "flash_attn_3", range(9, 10), "Hopper"),
}
"""FlashAttention's name in transformers → its module, its package, the major compute capabilities that it has kernels for, and the
name of their GPUs."""


def kernel(config: Config, hf_config: Any = None) -> str | None:
    """Return transformers' name of the attention kernel to load a model with; None for the model's best.

    Args:
        config: the run's config.
        hf_config: the model's own. Default: it is not known.

    Raises:
        RequestError: the model does not compute with it, or its package is not installed.
    """
    wanted = config.model.attention
    made = class_of(hf_config) if hf_config is not None else None
    if wanted != "auto" and made is not None and not computes_attention(made, wanted):
        others = ["auto", *(each for each in ("sdpa", "eager") if each != wanted and computes_attention(made, each))]
        kind = made.config_class.model_type
        raise RequestError(
            f"model.attention={wanted}, but transformers does not support it for {made.__name__} (model_type={kind}); use "
            f"{', '.join(others[:-1])} or {others[-1]}"
        )
    if wanted in FLASH:
        module, package, *_ = FLASH[wanted]
        if importlib.util.find_spec(module) is None:
            raise RequestError(f"model.attention={wanted} needs the package {package}; install it, or use sdpa")
    if wanted != "auto":
        return wanted
    installed = importlib.util.find_spec("flash_attn") is not None
    fits = config.scaling.use_gpu and config.dtype != "float32" and installed
    return "flash_attention_2" if fits and (made is None or computes_attention(made, "flash_attention_2")) else None


def check_kernel(config: Config, device: torch.device) -> None:
    """Check that the attention kernel of a config has code for a device.

    Raises:
        RequestError: it has none.
    """
    wanted = config.model.attention
    if wanted not in FLASH or device.type != "cuda":
        return
    *_, capabilities, generation = FLASH[wanted]
    if torch.cuda.get_device_capability(device)[0] not in capabilities:
        raise RequestError(
            f"model.attention={wanted} needs a {generation} GPU, but a worker has {torch.cuda.get_device_name(device)}; use "
            + ("sdpa" if wanted == "flash_attention_2" else "flash_attention_2 or sdpa")
        )


def use_examplewise(model: Any, config: Config) -> None:
    """Make a model on a CPU compute attention example by example, if the config and the model allow it.

    All examples together have fewer pairs of tokens than the row, the causal kernel skips half of these, and no mask is made: a
    row of 512 tokens takes a third of the time of sdpa with a mask.

    Models with sinks (gpt-oss) do so on every device: their own eager attention does not keep examples apart.
    """
    from transformers import AttentionInterface

    if config.model.attention in ("auto", "eager") and _has_sinks(model):
        AttentionInterface.register(WITH_SINKS, examplewise_with_sinks)
        model.set_attn_implementation(WITH_SINKS)
        return
    if config.model.attention != "auto" or config.scaling.use_gpu or not is_plain(model, config.data.sequence_length):
        return
    AttentionInterface.register(EXAMPLEWISE, examplewise)
    # Images attend both ways.
    text_alone = model.config.get_text_config() is model.config
    model.set_attn_implementation(EXAMPLEWISE if text_alone else {"text_config": EXAMPLEWISE})


def _has_sinks(model: Any) -> bool:
    """Return True if each head has a sink in addition to its keys, and torch's operations compute the attention."""
    eager = attention_implementation(model) == "eager" and can_set_attention(model)
    return eager and any(name.endswith(".sinks") for name, _ in model.named_parameters())


def is_plain(model: Any, tokens: int) -> bool:
    """Return True if each layer attends to all preceding tokens or to a window of them, and says so, in a row of ``tokens``."""
    hf_config = model.config.get_text_config()
    window = getattr(hf_config, "sliding_window", None)
    kinds = set(getattr(hf_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    return (
        attention_implementation(model) == "sdpa"
        and supports_flash_attention(model)
        and can_set_attention(model)
        and kinds <= {"full_attention", "sliding_attention"}
        and ("sliding_attention" not in kinds or window is None or window >= tokens or passes_window(model))
    )


def examplewise(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example of packed rows; an attention function as transformers' ``AttentionInterface`` has it.

    Args:
        module: the layer that asks.
        query: [rows, heads, tokens, size].
        key: [rows, key heads, tokens, size].
        value: as ``key``.
        attention_mask: not used.
        position_ids: [rows, tokens]; an example begins wherever they are 0.
        options: what torch's own attention takes besides, and ``sliding_window``: tokens that one attends to, itself among them.
            Default: all before it.

    Returns:
        [rows, tokens, heads, size], and no weights.
    """
    output = _each_example(module, _examples(module, query, key, value, position_ids), options)
    return output.view(*query.shape[::2], *output.shape[2:]), None


def examplewise_with_sinks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None,
    *,
    s_aux: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As ``examplewise``, for heads that may attend to a sink instead of a token (gpt-oss).

    Args:
        module: as for ``examplewise``, as are all that are not named here.
        s_aux: [heads] logits of the sinks.
        scaling: of the other logits.
        dropout: of the weights.
        sliding_window: tokens that one attends to, itself among them. Default: all before it.
    """
    outputs = []
    for q, k, v in _examples(module, query, key, value, position_ids):
        shared, tokens = q.shape[1] // k.shape[1], q.shape[2]
        logits = q @ k.repeat_interleave(shared, 1).transpose(-1, -2) * scaling
        visible = _visible(0, tokens, 0, sliding_window or tokens, q.device)
        logits = logits.masked_fill(~visible, float("-inf"))
        sinks = s_aux.to(logits.dtype).reshape(1, -1, 1, 1).expand(1, -1, tokens, 1)
        weights = torch.softmax(torch.cat([logits, sinks], -1).float(), -1)[..., :-1].to(v.dtype)
        weights = torch.nn.functional.dropout(weights, dropout, module.training)
        outputs.append((weights @ v.repeat_interleave(shared, 1)).transpose(1, 2))
    return torch.cat(outputs, dim=1).view(*query.shape[::2], *outputs[0].shape[2:]), None


def _examples(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position_ids: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield queries, keys and values of each example in packed rows, each as a separate row."""
    rows, _, tokens, _ = query.shape
    if position_ids is None or position_ids.shape[-1] != tokens:
        raise NoPositions(f"{type(module).__name__} does not pass positions on, so examples cannot be told apart")
    lengths = example_lengths(position_ids.expand(rows, tokens))
    return zip(*(_joined(states).split(lengths, dim=2) for states in (query, key, value)), strict=True)


def example_lengths(position_ids: torch.Tensor) -> list[int]:
    """Return the number of tokens in each example, over all rows, one after another.

    If they are not known before the pass, the GPU is asked for them in each layer.
    """
    if (known := known_lengths(position_ids)) is not None:
        return known
    begins = (position_ids.reshape(-1) == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(begins, [*begins[1:], position_ids.numel()], strict=True)]


def by_example(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    **options: Any,
) -> torch.Tensor:
    """Causal attention inside each of the examples that follow each other in one row.

    Args:
        module: the layer that asks.
        query: [1, heads, tokens, size].
        key: [1, key heads, tokens, size].
        value: as ``key``.
        lengths: tokens of each example.
        options: as for ``examplewise``.

    Returns:
        [1, tokens, heads, size].
    """
    examples = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return _each_example(module, examples, options)


def _each_example(module: Any, examples: Iterable[tuple[torch.Tensor, ...]], options: dict[str, Any]) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    window = options.get("sliding_window")
    options, outputs = {**options, "is_causal": True}, []
    for query, key, value in examples:
        tokens = query.shape[2]
        if window is None or window >= tokens:
            outputs.append(sdpa_attention_forward(module, query, key, value, None, **options)[0])
            continue
        # A part as long as the window sees at most two windows, so time and memory grow with the tokens, not their square.
        for start in range(0, tokens, window):
            seen, part = slice(max(0, start + 1 - window), start + window), slice(start, start + window)
            visible = _visible(start, min(tokens, part.stop), seen.start, window, query.device)[None, None]
            states = query[:, :, part], key[:, :, seen], value[:, :, seen]
            outputs.append(sdpa_attention_forward(module, *states, visible, **options)[0])
    return torch.cat(outputs, dim=1)


def _visible(start: int, stop: int, first: int, window: int, device: torch.device) -> torch.Tensor:
    """Return which tokens, from ``first`` to before ``stop``, those from ``start`` to before ``stop`` attend to: bool
    [stop − start, stop − first]."""
    distance = torch.arange(start, stop, device=device)[:, None] - torch.arange(first, stop, device=device)
    return (distance >= 0) & (distance < window)


class NoPositions(Exception):
    """A model's layers do not pass positions on to their attention."""


def keep_uncompiled(model: Any) -> None:
    """Let a model's compiled layers call a raysft attention function uncompiled: what it does depends on the rows' examples."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention_implementation(model)
    if name.startswith(OWN):
        AttentionInterface.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))


def use_plain(model: Any) -> None:
    """Undo ``use_examplewise``."""
    text_alone = model.config.get_text_config() is model.config
    model.set_attn_implementation("sdpa" if text_alone else {"text_config": "sdpa"})


def use_masks_for_images(model: Any, config: Config) -> None:
    """Make a model that gets images compute attention with masks, if the tokens of its images attend to each other, regardless
    of order (Gemma 3).

    Raises:
        RunFailed: the config names another kernel.
    """
    if kinds_argument(model.base_model) is None or attention_implementation(model) in ("sdpa", "eager"):
        return
    if config.model.attention != "auto":
        raise RunFailed(
            f"the tokens of an image attend to each other in {type(model).__name__}, which model.attention="
            f"{config.model.attention} does not compute; use auto or sdpa"
        )
    use_plain(model)


def without_adapters(model: Any) -> Any:
    """Return the transformers model inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_varlen(model: Any) -> bool:
    """Return True for FlashAttention, which separates examples by their positions only in a batch of one row, and for attention
    that exchanges tokens with other workers."""
    return attention_implementation(model).startswith(("flash", SEQUENCE))


def takes_examples(model: Any) -> bool:
    """Return True for FlashAttention in a model that passes on where examples begin, which every layer would ask the GPU for."""
    passes_on = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())
    return attention_implementation(model).startswith(("flash", f"{SEQUENCE}varlen")) and passes_on


def _joined(states: torch.Tensor) -> torch.Tensor:
    """Reshape [rows, heads, tokens, size] to one row: [1, heads, rows · tokens, size]."""
    return states.transpose(0, 1).flatten(1, 2)[None]
