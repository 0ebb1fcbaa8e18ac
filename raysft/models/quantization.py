"""Quantized weights: by bitsandbytes while loading, or already in the checkpoint."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.errors import RequestError

QUANTIZERS = {"gptq": "gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "aqlm": "aqlm"}
"""Method → the package that loads checkpoints quantized by it."""


def quantization_config(config: Config, partitioned: bool = False) -> Any:
    """Return the settings for bitsandbytes, or None if weights stay exact.

    Args:
        config: the run's config.
        partitioned: True if ZeRO-3 will split the weights: 4-bit ones are then packed into the type of the others.

    Raises:
        RequestError: bitsandbytes is not installed.
    """
    if config.model.quantization is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError(
            f"model.quantization={config.model.quantization} needs the package bitsandbytes; "
            "pip install 'raysft[quant]' on every node"
        )
    from transformers import BitsAndBytesConfig

    if config.model.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        bnb_4bit_quant_type=config.model.quantization_type,
        bnb_4bit_use_double_quant=config.model.double_quantization,
        bnb_4bit_quant_storage=getattr(torch, config.weight_dtype) if partitioned else None,
    )


def loading_options(config: Config, device: torch.device | str, partitioned: bool = False) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` for bitsandbytes, which quantizes on the weights' own device."""
    quantization = quantization_config(config, partitioned)
    return {"quantization_config": quantization, "device_map": {"": device}} if quantization else {}


def method_of(hf_config: Any) -> str | None:
    """Return the method that a checkpoint is quantized by (``gptq``, ``awq``, ``bitsandbytes`` …); None for exact weights."""
    quantized = getattr(hf_config, "quantization_config", None)
    if not quantized:
        return None
    method = quantized["quant_method"] if isinstance(quantized, dict) else quantized.quant_method
    return str(method).split(".")[-1].lower()


def check_method(model: str, method: str, config: Config) -> None:
    """Refuse a checkpoint that would be quantized twice, or whose library is not installed.

    Args:
        model: the model as messages name it, ``model.path=PATH``.
        method: what it is quantized by.
        config: the run's config.

    Raises:
        RequestError: with the remedy.
    """
    if config.model.quantization:
        raise RequestError(
            f"{model}: is already quantized ({method}), but model.quantization={config.model.quantization}; remove the key"
        )
    package = QUANTIZERS.get(method)
    if package and importlib.util.find_spec(package) is None:
        raise RequestError(
            f"{model}: is quantized by {method}, which needs the package {package}; install it on every node"
        )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from changing the layout of 4-bit weights on a CPU when they are first used without gradients.

    That layout multiplies in bfloat16, also where float32 is asked for (seen with 0.50.2: logits of SmolLM2-135M that are off
    by 0.5), and gradients that flow through it in later steps come out wrong (a third of their norm).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no tensor, as the type of a module has it
