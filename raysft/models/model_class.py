"""The class of transformers that a model is made of: for text, or for text and images."""

from __future__ import annotations

from typing import Any

from raysft.models.quantization import text_config


def auto_class(hf_config: Any) -> Any:
    """Return the class of transformers that makes a model from its config: for text, or for text and images."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(hf_config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def loaded_config(hf_config: Any) -> Any:
    """Return the part of a model's config that its training loads: the decoder's, with the quantization of the whole.

    A model for text and images is loaded whole.
    """
    from transformers import AutoModelForCausalLM

    return text_config(hf_config) if auto_class(hf_config) is AutoModelForCausalLM else hf_config


def sees_images(model: Any) -> bool:
    """Return True for a model that is loaded with the parts that images go through."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if not hasattr(model, "get_decoder"):
        return False
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(model.config), None)
    return hasattr(model.config, "vision_config") or (kind is not None and isinstance(model, kind))
