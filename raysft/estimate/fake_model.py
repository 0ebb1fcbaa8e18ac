"""The real classes of a model and its adapters, without the memory of their weights, and their sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.estimate.sizes import ModelSizes, weights_of
from raysft.estimate.traced_experts import TracedExperts, bytes_in_kernel, elements_of_adapters
from raysft.models.attention import FLASH, kernel, without_adapters
from raysft.models.decoder_layers import decoder_layers
from raysft.models.kt_experts import elements_of_experts, move_experts, recomputes_all
from raysft.models.lora_targets import linear_layers
from raysft.models.model_class import auto_class
from raysft.models.recomputation import recompute_layers
from raysft.train.new_adapter import add_adapter, peft_config
from raysft.train.parameter_groups import is_inner_matrix, outside_layers
from raysft.train.trained_weights import choose_weights

PERSISTENT = 100_000
"""Elements below which DeepSpeed's ZeRO-3 keeps a weight whole on each worker (``stage3_param_persistence_threshold``)."""


def model_without_weights(config: Config, hf_config: Any, adapter: str | None = None) -> Any:
    """Make the model to be trained, on torch's device ``meta``.

    Args:
        config: the run's config.
        hf_config: the model's own.
        adapter: folder of the adapter that training continues from.
    """
    dtype = getattr(torch, config.weight_dtype)
    attention = kernel(config, hf_config)
    if attention in FLASH:
        attention = None  # transformers would ask for the package; the trace has its own kernel
    with torch.device("meta"):
        model: Any = auto_class(hf_config).from_config(
            hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=config.model.runs_code
        )
        model.config.use_cache = False
        choose_weights(model, config)
        if config.model.adapter is not None:
            model = _adapted(model, config, adapter)
        if config.model.experts == "kt":
            chosen = model.config.get_text_config().num_experts_per_tok
            move_experts(model, config, partial(TracedExperts, chosen, recomputes_all(config)))
        if config.train.gradient_checkpointing:
            recompute_layers(model, config.train.recompute_layers)  # ``Setup`` knows where their inputs are
    return model.to(dtype)


def elements_of(config: Config, hf_config: Any) -> int:
    """Return how many weights a model has, tied ones once."""
    with torch.device("meta"):
        model: Any = auto_class(hf_config).from_config(
            hf_config, trust_remote_code=bool(config.model.trust_remote_code)
        )
    return sum(weight.numel() for weight in model.parameters())


def _adapted(model: Any, config: Config, adapter: str | None) -> Any:
    if adapter is not None:
        from peft import PeftConfig

        from raysft.storage.local_cache import local_copy

        adapter_config: Any = PeftConfig.from_pretrained(local_copy(adapter))
        adapter_config.inference_mode = False
    else:
        adapter_config = peft_config(model, config, "model")
    if config.model.finetuning == "lora":
        adapter_config.init_lora_weights = True
    return add_adapter(model, adapter_config)


def sizes_of(model: Any) -> ModelSizes:
    """Measure a model of ``model_without_weights``."""
    base = without_adapters(model)
    weights = dict(model.named_parameters())
    prefix, _ = decoder_layers(base)
    layers = base.get_submodule(prefix)
    # With peft, a linear layer is inside the layer that adapts it.
    inner = {name for name in linear_layers(base) if ".lora_" not in name}
    linear = [module.weight.numel() for name, module in base.named_modules() if name in inner]
    head, embedding, outside = base.get_output_embeddings(), base.get_input_embeddings(), outside_layers(model)
    head_weight = _plain(head)
    trained_head = head_weight is not None and head_weight.requires_grad
    experts, experts_of_layer = elements_of_experts(base)
    return ModelSizes(
        total=sum(weight.numel() for weight in weights.values()),
        trained=weights_of(
            [
                (tuple(weight.shape), is_inner_matrix(name, weight, outside))
                for name, weight in weights.items()
                if weight.requires_grad
            ]
        ),
        quantizable=sum(linear),
        largest=max(weight.numel() for weight in weights.values()),
        largest_linear=max(linear, default=0),
        largest_layer=max(sum(weight.numel() for weight in layer.parameters()) for layer in layers),
        small=sum(weight.numel() for weight in weights.values() if weight.numel() < PERSISTENT),
        tied_head=trained_head and head_weight is _plain(embedding),
        head=head_weight.numel() if head_weight is not None and trained_head else 0,
        experts=experts,
        experts_of_layer=experts_of_layer,
        adapters_in_kernel=elements_of_adapters(base),
        bytes_in_kernel=bytes_in_kernel(base),
    )


def _plain(module: Any) -> Any:
    """Return the weight of an embedding or a head that may have an adapter."""
    inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    return getattr(inner, "weight", None)


def without_memory(model: nn.Module) -> None:
    """Replace weights and buffers of the device ``meta`` with fake ones on the CPU, inside ``fake_tensors``; ties stay."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) not in made:
                made[id(weight)] = (weight, nn.Parameter(fake(weight), requires_grad=weight.requires_grad))
            setattr(module, name, made[id(weight)][1])
        for name, values in list(module.named_buffers(recurse=False)):
            setattr(module, name, fake(values))
