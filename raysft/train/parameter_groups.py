"""How an optimizer updates which parameters: weight decay, rates, and the matrices inside the layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from raysft.errors import RequestError
from raysft.train.deepspeed_internals import dimensions

Parameters = Mapping[str, nn.Parameter]
Groups = list[dict[str, Any]]


def trained(model: nn.Module) -> Parameters:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_decay(parameters: Mapping[Any, nn.Parameter], weight_decay: float) -> Groups:
    """Return matrices, which decay, and vectors (biases and norms), which do not."""
    groups = [
        {"params": [p for p in parameters.values() if dimensions(p) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if dimensions(p) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def by_rate(groups: Groups, parameters: Parameters, learning_rate: float, ratio: float | None) -> Groups:
    """Split groups for LoRA+ (Hayou et al. 2024), which has a higher learning rate for LoRA's B matrices."""
    if ratio is None:
        return groups
    fast = {id(weight) for name, weight in parameters.items() if "lora_B" in name or "lora_embedding_B" in name}
    split = [
        {**group, "params": [p for p in group["params"] if (id(p) in fast) is is_fast], "lr": learning_rate * factor}
        for group in groups
        for is_fast, factor in ((False, 1.0), (True, ratio))
    ]
    return [group for group in split if group["params"]]


def by_place(model: nn.Module, parameters: Parameters) -> tuple[Parameters, Parameters]:
    """Split parameters of a model into the matrices inside the layers and all others: embeddings, the output head, and vectors."""
    outside = outside_layers(model)
    inner = {name: weight for name, weight in parameters.items() if is_inner_matrix(name, weight, outside)}
    return inner, {name: weight for name, weight in parameters.items() if name not in inner}


def by_target(model: nn.Module, parameters: Parameters, target: str | Iterable[str]) -> tuple[Parameters, Parameters]:
    """Split parameters into the matrices that ``train.optimizer_target`` selects and all others.

    Raises:
        RequestError: a name or regular expression matches no module that is trained.
    """
    if isinstance(target, str):
        return by_place(model, parameters)
    # The loss holds the model as ``model``; patterns refer to names inside it.
    modules = {
        name: name.rpartition(".")[0].removeprefix("model.")
        for name, weight in parameters.items()
        if dimensions(weight) == 2
    }
    for pattern in target:
        if not any(re.search(pattern, module) for module in modules.values()):
            last = sorted({module.rpartition(".")[2] for module in modules.values()})
            raise RequestError(
                f"train.optimizer_target contains {pattern!r}, but no module with a trained matrix matches it; "
                f"use names such as {', '.join(last):.200}, or all"
            )
    chosen = {name: parameters[name] for name in modules if any(re.search(one, modules[name]) for one in target)}
    return chosen, {name: weight for name, weight in parameters.items() if name not in chosen}


def outside_layers(model: nn.Module) -> set[int]:
    """Return the ids of the weights of a model's embeddings and output head, which some models call ``wte`` or ``output``."""
    found = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        head: Any = getattr(module, "get_output_embeddings", lambda: None)()
        found |= {id(weight) for weight in head.parameters()} if head is not None else set()
    return found


def is_inner_matrix(name: str, parameter: Any, outside: set[int]) -> bool:
    """Return True for a matrix inside a layer: neither of an embedding nor of the output head, nor of an adapter of one of them."""
    return dimensions(parameter) == 2 and id(parameter) not in outside and "embed" not in name and "lm_head" not in name
