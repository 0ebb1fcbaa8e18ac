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


def towers(model: Any) -> list[Any]:
    """Return the parts of a model that only images, video or sound go through: neither decoder nor output head."""
    if not hasattr(model, "get_decoder") or not hasattr(model.config, "vision_config"):
        return []
    inside = {id(module) for part in (model.get_decoder(), model.get_output_embeddings()) for module in part.modules()}
    found: list[Any] = []

    def collect(module: Any) -> None:
        for child in module.children():
            if id(child) in inside:
                continue
            if any(id(part) in inside for part in child.modules()):
                collect(child)
            else:
                found.append(child)

    collect(model)
    return found
