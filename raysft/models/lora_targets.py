"""The modules that get an adapter if a config says ``all``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Container
from typing import Any

from torch import nn

from raysft.config.model import Part
from raysft.models.model_class import sees_images
from raysft.models.model_parts import part_of
from raysft.models.peft_internals import fit_to_model
from raysft.models.routers import routers
from raysft.models.transformers_internals import weight_conversions


def linear_layers(model: Any, parts: Container[Part] = ("language",)) -> set[str]:
    """Return the names of all linear layers in some parts of a model, except the output head, routers and the projector.

    The projector of a vision-language model is trained as a whole.
    """
    from transformers.pytorch_utils import Conv1D

    head, left_out = model.get_output_embeddings(), routers(model)
    # Torch's attention computes with the weight of its last layer and does not call it: an adapter would have no effect.
    left_out |= {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    part = part_of(model)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and part(name) in parts
        and part(name) != "projector"
        and not _is_in(name, left_out)
    }


def modules_in(model: Any, parts: Container[Part]) -> list[str]:
    """Return the names of the modules of some parts, except the projector, of which all of them are trained in full."""
    part = part_of(model)
    return [name for name, _ in model.named_modules() if part(name) in parts and part(name) != "projector"]


EXPERTS = "experts"
"""What experts are called among a model's modules, and in a config."""


def names_experts(target: str) -> bool:
    """Return True for the name of the experts of all layers, or of some: ``layers.1.mlp.experts``."""
    return target.rpartition(".")[2] == EXPERTS


def target_experts(config: Any, model: Any, targets: Collection[str]) -> None:
    """Make a peft config that names ``experts`` among its modules mean their weights.

    Since transformers 5 most models have one module for the experts of a layer, with a parameter for each of their matrices; one
    that stands for two has twice the rank, as with ``all-linear``. Others have a linear layer for each.
    """
    names = {name for name in config.target_modules if not names_experts(name)}
    chosen = [target for target in targets if names_experts(target)]
    parameters = set[str]()
    for name, module in model.named_modules():
        parts = name.split(".")
        whole = ".".join(parts[: parts.index(EXPERTS) + 1]) if EXPERTS in parts else ""
        target = min((each for each in chosen if f".{whole}".endswith(f".{each}")), key=len, default=None)
        if target is None:
            continue
        if name == whole:
            own = (each for each, _ in module.named_parameters(recurse=False) if not each.endswith("bias"))
            parameters |= {f"{target}.{each}" for each in own}
        elif isinstance(module, nn.Linear):
            names.add(name)
    config.target_modules, config.target_parameters = names, parameters or None
    for each in parameters:
        if each.endswith("gate_up_proj"):
            pattern = rf".*\.{re.escape(each)}"
            config.rank_pattern[pattern] = 2 * config.r
            _keep_scale(config, pattern)


def target_routers(config: Any, model: Any) -> None:
    """Make a peft config that names routers among its modules mean their weights: most routers are not linear layers.

    peft does so itself for some of the models that it knows.
    """
    found = {name: model.get_submodule(name) for name in routers(model)}
    own = {
        name
        for name, module in found.items()
        if not isinstance(module, nn.Linear) and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    for target in list(config.target_modules):
        named = {name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")}
        if chosen := named & own:
            config.target_modules = {*config.target_modules, *(named - own)} - {target}
            keys = {target} if named == chosen else chosen
            config.target_parameters = {*(config.target_parameters or ()), *(f"{key}.weight" for key in keys)}


def targeted_routers(config: Any, model: Any) -> list[str]:
    """Return the names of the routers whose weights a peft config targets, as it names them."""
    names = [f".{name}.weight" for name in routers(model)]
    keys = getattr(config, "target_parameters", None) or ()
    return sorted(key.removesuffix(".weight") for key in keys if any(name.endswith(f".{key}") for name in names))


def targeted(model: Any, targets: Collection[str], parts: Container[Part]) -> list[str]:
    """Return what peft is given for names of modules: full names in a vision-language model, where other parts share them."""
    if not sees_images(model):
        return list(targets)
    ends = tuple(f".{target}" for target in targets)
    return [name for name in modules_in(model, parts) if f".{name}".endswith(ends)]


def set_targets(config: Any, model: Any, parts: Container[Part] = ("language",)) -> None:
    """Remove routers from a peft config that was made for ``all-linear``; experts stay as peft has them.

    For ``all-linear`` peft also targets the weights of the experts of many mixtures, which are not linear layers since
    transformers 5, and with them those of the routers. In a vision-language model, some ``parts`` get adapters.
    """
    layers = linear_layers(model, parts)
    fit_to_model(config, model, weight_conversions(model))
    for pattern in getattr(config, "rank_pattern", ()):  # OFT has no ranks
        _keep_scale(config, pattern)
    if not isinstance(config.target_modules, str):
        # Its experts take the place of all layers that are called like theirs.
        part = part_of(model)
        layers = {
            name for name in layers if name.rpartition(".")[2] in config.target_modules or part(name) != "language"
        }
        left_out = routers(model)
        weights = [name for name, _ in model.named_parameters() if _is_in(name, left_out)]
        config.target_parameters = {
            key for key in config.target_parameters if not any(name.endswith(f".{key}") for name in weights)
        }
    config.target_modules = layers


def _keep_scale(config: Any, pattern: str) -> None:
    """Give what has another rank the scale of the others: alpha ÷ rank, or with rsLoRA alpha ÷ √rank."""
    share = config.rank_pattern[pattern] / config.r
    config.alpha_pattern[pattern] = config.lora_alpha * (math.sqrt(share) if config.use_rslora else share)


def _is_in(name: str, modules: set[str]) -> bool:
    """Return True if a name is that of one of the modules, or of something inside one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))
