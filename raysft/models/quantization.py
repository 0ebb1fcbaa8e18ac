"""Quantized weights: by bitsandbytes while loading, or already in the checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.errors import RequestError

QUANTIZERS = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("kernels",),
    "fbgemm_fp8": ("fbgemm_gpu",),
    "gptq": ("optimum", "gptqmodel"),
    "hqq": ("hqq",),
    "quanto": ("optimum.quanto",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}
"""Method → the modules that transformers needs to load checkpoints quantized by it."""
STORED = ("fp8", "mxfp4")
"""Methods of checkpoints that are dequantized before use (``dequantized``)."""
EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Data types of weights that are not quantized."""


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
    """Return the method that a checkpoint is quantized by (``gptq``, ``awq``, ``bitsandbytes`` …); None for exact weights.

    Args:
        hf_config: the config as transformers loads it, or the content of a ``config.json``. Of a model that is more than its
            decoder, the whole or the decoder's part may name the method.
    """
    if not (settings := _settings_of(hf_config)):
        return None
    # Early checkpoints of bitsandbytes do not name it.
    early = any(key.lstrip("_").startswith(("load_in_", "bnb_", "llm_int8_")) for key in settings)
    method = settings.get("quant_method") or ("bitsandbytes" if early else "an unnamed method")
    return str(getattr(method, "value", method)).lower()


def is_in_8_bits(hf_config: Any) -> bool:
    """Return True if a checkpoint is quantized by bitsandbytes in 8 bits."""
    settings = _settings_of(hf_config)
    return method_of(hf_config) == "bitsandbytes" and bool(settings.get("load_in_8bit", settings.get("_load_in_8bit")))


def _settings_of(hf_config: Any) -> dict[str, Any]:
    if isinstance(hf_config, dict):
        quantized = hf_config.get("quantization_config") or (hf_config.get("text_config") or {}).get(
            "quantization_config"
        )
    else:
        quantized = getattr(text_config(hf_config), "quantization_config", None)
    if not quantized:
        return {}
    return quantized if isinstance(quantized, dict) else vars(quantized)


def text_config(hf_config: Any) -> Any:
    """Return the decoder's part of a config, with the quantization of the whole, as transformers loads the decoder alone."""
    text = hf_config.get_text_config(decoder=True)
    if quantized := getattr(hf_config, "quantization_config", None):
        text.quantization_config = quantized
    return text


def check_method(model: str, method: str, config: Config) -> None:
    """Refuse a checkpoint that would be quantized twice, or that nothing installed can load.

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
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    if method != "bitsandbytes" and method not in AUTO_QUANTIZER_MAPPING:
        # Its weights would be read as if they were exact.
        raise RequestError(
            f"{model}: is quantized with {method}, which this version of transformers does not support; use the model that it "
            "was quantized from, with model.quantization"
        )
    if method == "fp8" and not (config.model.dequantize or config.scaling.use_gpu):
        raise RequestError(
            f"{model}: is stored in FP8, which CPUs have no kernels for (scaling.use_gpu=false), but "
            "model.dequantize=false; remove the key"
        )
    packages = [name.replace("_", "-").replace(".", "-") for name in QUANTIZERS.get(method, ()) if not _installed(name)]
    if packages:
        needs = f"package{'s' if len(packages) > 1 else ''} {' and '.join(packages)}"
        raise RequestError(
            f"{model}: is quantized with {method}, which needs the {needs}; pip install {' '.join(packages)} on every node"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


def exact_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that may change their data type: those of modules without quantized weights.

    8-bit floats and packed 4-bit weights may look like exact ones; in another type, or with scales in another type, they stand for
    other numbers.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if all(type(parameter) is nn.Parameter and parameter.dtype in EXACT for parameter in own):
            yield from own


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from changing the layout of 4-bit weights on a CPU when they are first used without gradients.

    That layout multiplies in bfloat16, even where float32 is asked for (seen with 0.50.2: logits of SmolLM2-135M that are off
    by 0.5), and gradients that flow through it in later steps come out wrong (a third of their norm).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no tensor, as the type of a module has it
