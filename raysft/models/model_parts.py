"""The parts of a vision-language model: language model, projector and vision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from raysft.config.model import Part
from raysft.errors import RequestError, as_yaml
from raysft.models.model_class import sees_images

SENSES = ("image", "audio")
MERGER = "merger"
"""Inside its tower, Qwen's projector; the towers of DeepStack's features are part of the vision."""


def part_of(model: Any) -> Callable[[str], Part]:
    """Return which part each module and parameter of a model belongs to, by its name.

    ``language``: decoder and output head; ``vision``: what encodes images and sound; ``projector``: what is neither, and the part
    of an encoder that merges its patches into tokens. A text-only model is ``language``.
    """
    if not sees_images(model):
        return lambda name: "language"
    places: dict[str, Part] = dict.fromkeys(
        _names(model, [model.get_decoder(), model.get_output_embeddings()]), "language"
    )
    encoders = [each for sense in SENSES if (each := model.get_encoder(sense)) is not None]
    for name in _names(model, [each for each in encoders if model.get_decoder() not in set(each.modules())]):
        places |= {name: "vision", f"{name}.{MERGER}": "projector"}

    def part(name: str) -> Part:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if found := places.get(".".join(parts[:length])):
                return found
        return "projector"

    return part


def check_parts(model: nn.Module, wanted: Iterable[Part]) -> None:
    """Refuse parts that a model does not have.

    Raises:
        RequestError: it lacks one.
    """
    part = part_of(model)
    known = {part(name) for name, _ in model.named_parameters()}
    for each in wanted:
        if each not in known:
            raise RequestError(
                f"model.train_parts={as_yaml(list(wanted))} names {each}, but {type(model).__name__} has no such part; "
                f"choose from {as_yaml(sorted(known))}"
            )


def train_only(model: nn.Module, wanted: Iterable[Part]) -> None:
    """Freeze the other parts of a model."""
    part = part_of(model)
    for name, parameter in model.named_parameters():
        if part(name) not in wanted:
            parameter.requires_grad_(False)


def whole_modules(model: nn.Module, wanted: Part) -> list[str]:
    """Return the names of the largest modules with weights that lie in a part and can be called."""
    part = part_of(model)

    def inside(prefix: str, module: nn.Module) -> Iterator[str]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            parts = {part(f"{name}.{each}") for each, _ in child.named_parameters()}
            if parts == {wanted} and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                yield name
            elif wanted in parts:
                yield from inside(f"{name}.", child)

    return list(inside("", model))


def loose_weights(model: nn.Module, wanted: Part) -> list[str]:
    """Return the names of the weights of a part that lie in none of its ``whole_modules``, as LLaVA-NeXT's ``image_newline``."""
    part, modules = part_of(model), tuple(f"{name}." for name in whole_modules(model, wanted))
    return [name for name, _ in model.named_parameters() if part(name) == wanted and not name.startswith(modules)]


def keep_exact(quantization: Any, hf_config: Any, kind: Any, runs_code: bool = False) -> None:
    """Let bitsandbytes quantize only the language model.

    Args:
        quantization: the settings of bitsandbytes, changed in place.
        hf_config: the model's own config.
        kind: the class of transformers that loads it.
        runs_code: True if code that comes with the model may run.
    """
    import torch

    with torch.device("meta"):
        model = kind.from_config(copy.deepcopy(hf_config), trust_remote_code=runs_code)
    if sees_images(model):
        head = _names(model, [model.get_output_embeddings()])  # which stays exact by default only
        quantization.llm_int8_skip_modules = [
            *head,
            *whole_modules(model, "vision"),
            *whole_modules(model, "projector"),
        ]


def _names(model: nn.Module, modules: Iterable[Any]) -> list[str]:
    sought = [each for each in modules if each is not None and each is not model]
    return [name for name, module in model.named_modules() if name and any(module is each for each in sought)]
