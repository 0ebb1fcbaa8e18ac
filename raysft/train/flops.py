"""FLOPs of a training step, and the peak FLOPs of GPUs, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from raysft.models.kt_experts import elements_of_experts
from raysft.train.deepspeed_internals import numel
from raysft.train.reference import START

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10": 125e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Part of a device's name → dense 16-bit FLOP/s from its data sheet; the first match counts."""
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names in models' configs for the number of experts per token, and per layer."""


def peak_flops(device: torch.device) -> float | None:
    """Return the peak 16-bit FLOP/s of a device; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def model_flops(model: Any, tokens: float, squares: float, loss_tokens: float) -> float:
    """Count the FLOPs of one forward and backward pass, without recomputation.

    As in Chowdhery et al. 2022 (PaLM, appendix B): 6 per weight and token (2 in forward, 2 for the gradient of the activations,
    and 2 for that of the weight, which frozen weights do not need), and 12 · layers · width per pair of tokens in one example,
    half of them with a causal mask. The output head is computed for loss tokens only, and each token uses only some of the experts.

    Args:
        model: a transformers model, with or without adapters.
        tokens: number of tokens without padding.
        squares: sum over examples of the square of their length.
        loss_tokens: number of loss tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = _share_of_experts(config)
    body = sum(
        _flops(weight) * (share if "experts" in name.split(".") else 1.0)
        for name, weight in weights_of(model)
        # peft also keeps the originals of modules that it trains in full, and computes nothing with them.
        if weight is not head and weight is not embedding and "original_module" not in name.split(".")
    )
    body += 4.0 * share * elements_of_experts(base)[0]
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * width * squares / 2
    return tokens * body + loss_tokens * _flops(head) + attention


def trainer_flops(model: torch.nn.Module, tokens: int) -> float:
    """Count the FLOPs of training as a ``Trainer`` does for ``total_flos``: 6 per token and weight outside the embeddings.

    It ignores which weights are frozen, which tokens the head is computed for, and attention; ``model_flops`` does not.

    Args:
        model: a transformers model, with or without adapters.
        tokens: number of tokens without padding.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    counted = sum(count(weight) for _, weight in weights_of(model) if id(weight) not in embeddings)
    return 6.0 * tokens * (counted + elements_of_experts(model)[0])


def weights_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield names and weights of a model, without the adapter that only records how the training began."""
    return ((name, weight) for name, weight in model.named_parameters() if START not in name.split("."))


def _share_of_experts(config: Any) -> float:
    """Return the share of its experts that a mixture of experts uses for each token; 1 for other models."""
    chosen = next((value for name in CHOSEN_EXPERTS if (value := getattr(config, name, None))), None)
    experts = next((value for name in EXPERTS if (value := getattr(config, name, None))), None)
    return chosen / experts if isinstance(chosen, int) and isinstance(experts, int) else 1.0


def _flops(parameter: Any) -> float:
    return (6.0 if parameter.requires_grad else 4.0) * count(parameter)


def count(parameter: Any) -> int:
    """Count the weights in a parameter, even if it is quantized or partitioned."""
    # bitsandbytes stores two 4-bit weights in a byte.
    in_four_bits = type(parameter).__name__ == "Params4bit"
    return numel(parameter) * (2 * parameter.element_size() if in_four_bits else 1)
