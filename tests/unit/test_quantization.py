"""Which weights of a quantized model may change their data type."""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from raysft.models.quantization import exact_parameters


def test_weights_of_8_bits_keep_their_type_and_that_of_their_scales():
    """In a wider type, the layer would take the weights without their scales."""
    quantized = FP8Linear(128, 128, block_size=(128, 128))
    model = nn.Sequential(nn.Embedding(4, 128), quantized, nn.Linear(128, 2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in exact_parameters(model)] == ["0.weight", "2.weight", "2.bias"]
    assert {"1.weight", "1.weight_scale_inv"} <= {*names.values()}


def test_packed_weights_keep_the_type_that_they_are_stored_in():
    from bitsandbytes.nn.modules import Linear4bit

    model = nn.Sequential(Linear4bit(64, 64, quant_storage=torch.bfloat16).to("cpu"), nn.Linear(64, 2))
    assert all(weight.dtype.is_floating_point for weight in model.parameters())
    assert [*exact_parameters(model)] == [*model[1].parameters()]
