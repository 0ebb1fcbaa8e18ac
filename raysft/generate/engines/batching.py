"""Decide from its config alone whether a model supports continuous batching."""

from __future__ import annotations

from typing import Any, Literal

from raysft.config import Config, with_overrides
from raysft.errors import RequestError, one_line
from raysft.generate.engines.context_window import longrope_threshold
from raysft.models.adapter_files import adapter_base
from raysft.models.remote_code import runs_code
from raysft.models.transformers_internals import is_recurrent, supports_registered_attention
from raysft.storage.local_cache import model_copy


def batching(config: Config, model: str) -> Literal["continuous", "static"]:
    """Resolve ``generate.batching: auto``.

    Args:
        model: folder of a Hugging Face model, or of a peft adapter.

    Raises:
        RequestError: it is ``continuous``, which the model does not support.
    """
    settings = config.generate
    if settings.batching == "static":
        return "static"
    if settings.batching == "auto":
        # A CPU gathers the cache from its pages at every step: 0.4 to 0.6 times the speed of static batches of 64.
        fits = (
            config.scaling.use_gpu
            and settings.num_beams == settings.gpus_per_engine == 1
            and settings.max_seconds is None
        )
        return "continuous" if fits and not obstacle(config, model) else "static"
    if reason := obstacle(config, model):
        raise refused(model, reason)
    return "continuous"


def for_images(config: Config) -> Config:
    """Return the config for prompts with images: transformers' continuous batching takes tokens alone.

    Raises:
        RequestError: the config names continuous batching.
    """
    if config.generate.engine != "transformers":
        return config
    if config.generate.batching == "continuous":
        raise RequestError(
            "generate.batching=continuous, but some prompts have images, which only static batches support; set "
            "generate.batching to auto or static"
        )
    return with_overrides(config, {"generate.batching": "static"})


def refused(model: str, reason: str) -> RequestError:
    """Build the error for a model that does not support ``generate.batching=continuous``."""
    return RequestError(
        f"generate.batching=continuous does not support {model}: {reason}; set generate.batching to auto or static"
    )


def obstacle(config: Config, model: str) -> str:
    """Return why a model does not support continuous batching, or an empty string."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    folder = model_copy(model)
    if runs_code(config, folder):
        return "it runs its own code"
    try:
        hf_config: Any = AutoConfig.from_pretrained(
            adapter_base(folder) or folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        return f"its config.json cannot be read ({one_line(error, 120)})"
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    kind = f"model_type={hf_config.model_type}"
    if found is None or hf_config.is_encoder_decoder:
        return f"{kind} is not a decoder of transformers"
    if is_recurrent(found):
        return f"{kind} is recurrent"
    # Attention outside transformers' registry, or eager attention only, would not see the pages.
    if not supports_registered_attention(found):
        return f"{kind} implements its own attention"
    if longrope_threshold(hf_config):
        return f"{kind} scales its positions by the longest prompt in the batch (longrope)"
    text = hf_config.get_text_config()
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        return f"{kind} scales its positions by the length of each text (dynamic)"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{kind} has layers of type {min(kinds)}"
    if getattr(text, "kv_lora_rank", None) or getattr(text, "num_kv_shared_layers", None):
        return f"{kind} compresses or shares keys and values"
    return ""
