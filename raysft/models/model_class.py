"""The transformers class of a model: for text, or for text and images."""

from __future__ import annotations

from typing import Any

from raysft.models.processor import has_processor
from raysft.models.quantization import text_config


def auto_class(hf_config: Any) -> Any:
    """Return the transformers class that makes a model from its config: for text, or for text and images.

    Of the few models that transformers can also load as their language model alone (Qwen3.5, Mllama), those whose folder has a
    processor are loaded whole, so that the trained model can still take images.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(hf_config)
    whole, text = (
        mapping.get(kind, None) for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    )
    if whole is not None and (text in (None, whole) or has_processor(hf_config.name_or_path or "/")):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def class_of(hf_config: Any) -> Any:
    """Return the class of the model itself; None of one whose own code decides."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM

    of_text = auto_class(hf_config) is AutoModelForCausalLM
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING if of_text else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    made: Any = mapping.get(type(hf_config), None)
    return made if isinstance(made, type) else None


def loaded_config(hf_config: Any) -> Any:
    """Return the part of a model's config that its training loads: the decoder's, with the quantization of the whole.

    A vision-language model is loaded whole.
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
