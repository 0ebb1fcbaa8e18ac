"""Which of a model's own weights are trained: whole parts, or some of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from raysft.config import Config
from raysft.errors import RequestError, as_yaml
from raysft.models.decoder_layers import decoder_layers, spread_layers
from raysft.models.model_parts import check_parts, part_of, train_only
from raysft.models.new_tokens import vocabulary_modules


def choose_weights(model: Any, config: Config) -> None:
    """Freeze the weights of a model that the config does not train; adapters freeze all of them on their own.

    Raises:
        RequestError: the model has no such parts, layers or modules.
    """
    check_parts(model, config.model.train_parts)
    if config.model.finetuning == "freeze":
        freeze(model, config)
    else:
        train_only(model, config.model.train_parts)


def freeze(model: nn.Module, config: Config) -> None:
    """Freeze all weights except those that ``model.freeze`` and, for the vision parts, ``model.train_parts`` name.

    Raises:
        RequestError: the model has no such layers or modules.
    """
    section = config.model.freeze
    prefix, count = decoder_layers(model)
    layers = tuple(f"{prefix}.{index}." for index in trained_layers(config, count))
    inside: Sequence[str] | None = None if section.modules == "all" else section.modules
    part = part_of(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if part(name) == "language"]
    in_layers = {each for name in names if name.startswith(layers) for each in name.split(".")[:-1]}
    outside = {each for name in names if not name.startswith(f"{prefix}.") for each in name.split(".")[:-1]}
    _check_names("model.freeze.modules", inside or (), in_layers)
    _check_names("model.freeze.extra_modules", section.extra_modules, outside)
    model.requires_grad_(False)
    # A tied weight has several names; it is trained if any of them is chosen.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = set(name.split("."))
        if part(name) != "language":
            trained = part(name) in config.model.train_parts
        elif name.startswith(f"{prefix}."):
            trained = name.startswith(layers) and (inside is None or bool(parts & set(inside)))
        else:
            trained = bool(parts & set(section.extra_modules))
        if trained:
            parameter.requires_grad_(True)
    for module in vocabulary_modules(model, config).values():
        module.requires_grad_(True)


def trained_layers(config: Config, count: int) -> list[int]:
    """Return the layers, out of this many, that ``finetuning: freeze`` trains.

    Raises:
        RequestError: the model has no such layers.
    """
    chosen = config.model.trained_layers
    named = f"model.freeze.layers={as_yaml(chosen)}"
    if isinstance(chosen, str):
        return spread_layers(count, config.model.new_layers)
    if isinstance(chosen, int):
        if abs(chosen) > count:
            raise RequestError(f"{named}, but the model has {count} layers; use at most {count}")
        if config.model.freeze.spread:
            return spread_layers(count, chosen)
        return list(range(count - chosen, count) if chosen > 0 else range(-chosen))
    outside = next((index for index in chosen if not -count <= index < count), None)
    if outside is not None:
        raise RequestError(
            f"{named} names layer {outside}, but the model has {count} layers; use 0 to {count - 1}, or -{count} to -1"
        )
    indices = [index % count for index in chosen]
    if twice := next(((index, place) for place, index in enumerate(indices) if index in indices[:place]), None):
        index, place = twice
        raise RequestError(
            f"{named} names layer {index} of the model's {count} twice, also as {chosen[place]}; name each layer once"
        )
    return sorted(indices)


def _check_names(key: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            listed = ", ".join(sorted(part for part in known if not part.isdigit()))
            raise RequestError(
                f"{key} names {name!r}, but the model has no such module there; use one of: {listed:.200}"
            )
