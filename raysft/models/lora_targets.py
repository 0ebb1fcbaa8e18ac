"""The modules that get an adapter if a config says ``all``."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator
from typing import Any

from torch import nn

from raysft.config.model import Part
from raysft.models.model_class import sees_images
from raysft.models.model_parts import part_of
from raysft.models.peft_internals import fit_to_model
from raysft.models.transformers_internals import recorded_outputs, weight_conversions


def linear_layers(model: Any, parts: Container[Part] = ("language",)) -> set[str]:
    """Return the names of all linear layers in some parts of a model, except the output head, routers and the projector.

    The projector of a model for images is trained as a whole.
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


def targeted(model: Any, targets: Collection[str], parts: Container[Part]) -> list[str]:
    """Return what peft is given for names of modules: full names in a model for images, where other parts have the same ones."""
    if not sees_images(model):
        return list(targets)
    ends = tuple(f".{target}" for target in targets)
    return [name for name in modules_in(model, parts) if f".{name}".endswith(ends)]


def routers(model: Any) -> set[str]:
    """Return the names of the modules that route tokens to experts, in a mixture of experts.

    transformers marks those whose output are a model's router logits. Where it marks a whole block, or knows nothing of the
    model, the router is what is called so inside it, or beside the experts. The gate of a shared expert is one too.
    """
    marked = tuple(_marked(model))
    found = set()
    for name, module in model.named_modules():
        is_marked = bool(marked) and isinstance(module, marked)
        if is_marked and _is_called_router(name):
            found.add(name)
        elif is_marked or any(child == "experts" for child, _ in module.named_children()):
            found |= {f"{name}.{child}" for child, _ in module.named_children() if _is_called_router(child)}
    return found


def set_targets(config: Any, model: Any, parts: Container[Part] = ("language",)) -> None:
    """Remove routers from a peft config that was made for ``all-linear``; experts stay as peft has them.

    For ``all-linear`` peft also targets the weights of the experts of many mixtures, which are not linear layers since
    transformers 5, and with them those of the routers. Of a model for images, some ``parts`` get adapters.
    """
    layers = linear_layers(model, parts)
    fit_to_model(config, model, weight_conversions(model))
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


def _marked(model: Any) -> Iterator[type]:
    """Yield the classes of the modules that return a model's router logits."""
    for module in model.modules():
        recorded = recorded_outputs(module).get("router_logits", ())
        for each in recorded if isinstance(recorded, Iterable) and not isinstance(recorded, type) else (recorded,):
            kind = getattr(each, "target_class", each)
            if isinstance(kind, type):
                yield kind


def _is_called_router(name: str) -> bool:
    own = name.rpartition(".")[2]
    return own.endswith("gate") or "router" in own


def _is_in(name: str, modules: set[str]) -> bool:
    """Return True if a name is that of one of the modules, or of something inside one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))
