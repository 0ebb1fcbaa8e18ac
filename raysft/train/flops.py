"""How much of what a GPU can compute a training uses."""

from __future__ import annotations

from typing import Any

import torch

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
"""Dense 16-bit operations per second, as the makers give them, by a part of the device's name; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """What the device computes at most, in 16-bit floating-point operations per second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def model_flops(model: Any, tokens: float, squares: float, trained: float) -> float:
    """Operations that one pass forward and backward over some tokens needs, recomputation not counted.

    As Chowdhery et al. 2022 (PaLM, appendix B) count it: 6 for each weight and token, 2 of them forward, 2 for the gradient of
    the activations and 2 for that of the weight, which frozen weights do not need; and 12 · layers · width for each pair of
    tokens that attend to each other, half of them with a causal mask. The output head works on trained tokens alone.

    Args:
        model: a transformers model, with or without adapters.
        tokens: without padding.
        squares: sum over examples of the square of their tokens.
        trained: trained tokens.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    head, embedding = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    body = sum(_flops(each) for each in model.parameters() if each is not head and each is not embedding)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * width * squares / 2
    return tokens * body + trained * _flops(head) + attention


def _flops(parameter: Any) -> float:
    size = getattr(parameter, "ds_numel", parameter.numel())
    return (6.0 if parameter.requires_grad else 4.0) * size
