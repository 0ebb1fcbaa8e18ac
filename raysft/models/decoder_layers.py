"""The layers of a decoder: where they are, where new ones go, and the config of a model with more of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from raysft.errors import RequestError

INDICES = (
    "attn_layer_indices", "cross_attention_layers", "full_attention_idxs", "full_attn_idxs", "global_attn_idx",
    "hybrid_layer_ids", "mlp_only_layers", "moe_layers",
)  # fmt: skip
"""Keys of models' configs that list indices of layers."""
FIRST = ("first_k_dense_replace", "max_window_layers", "num_dense_layers")
"""Keys that count the layers of a kind, starting with the first."""
BY_INDEX = ("per_layer_config",)
"""Keys that map indices to settings of layers."""
DEPTH = "num_hidden_layers"
LAST = ("num_kv_shared_layers",)
"""Keys that count the layers of a kind before the last."""


def decoder_layers(model: Any) -> tuple[str, int]:
    """Name and length of the list that holds the decoder's layers."""
    count = model.config.get_text_config().num_hidden_layers
    # A vision tower may have as many layers; look in the decoder only.
    decoder = set(model.get_decoder().modules()) if hasattr(model, "get_decoder") else set(model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in decoder:
            return name, count
    raise RequestError(
        "model.freeze, model.new_layers and train.compile need a list of layers, but "
        f"{type(model).__name__} has none of length {count}; "
        "set model.finetuning to lora or full, and remove model.new_layers and train.compile"
    )


def spread_layers(layers: int, chosen: int) -> list[int]:
    """Return the last layer of each of this many parts of a model, which are as even as possible.

    In a model expanded by this many layers, these are the new ones.

    >>> spread_layers(12, 4), spread_layers(7, 3)
    ([2, 5, 8, 11], [1, 3, 6])
    """
    return [(part + 1) * layers // chosen - 1 for part in range(chosen)]


def origins(layers: int, new: int) -> list[int]:
    """Return, for each layer of the expanded model, the layer that it is or that it copies.

    >>> origins(4, 2)
    [0, 1, 1, 2, 3, 3]
    """
    added, found = set(spread_layers(layers + new, new)), -1
    return [found if index in added else (found := found + 1) for index in range(layers + new)]


def expand_config(hf_config: Any, new: int) -> Any:
    """Return a model's config with new layers, and with all its per-layer settings adjusted.

    Raises:
        RequestError: there are more new layers than layers.
    """
    text = hf_config.get_text_config()
    layers = text.num_hidden_layers
    if new > layers:
        raise RequestError(
            f"model.new_layers={new} inserts a layer after some of the model's layers, but it has {layers}; use at most {layers}"
        )
    origin, values = origins(layers, new), text.to_dict()
    values |= {name: _of_layers(name, value, layers, origin) for name, value in values.items()}
    values |= _explicit_experts(text, origin)
    expanded = type(text).from_dict({**values, text.attribute_map.get(DEPTH, DEPTH): len(origin)})
    if text is hf_config:
        return expanded
    whole = copy.deepcopy(hf_config)
    setattr(whole, next(name for name in hf_config.sub_configs if getattr(hf_config, name) is text), expanded)
    return whole


def _of_layers(name: str, value: Any, layers: int, origin: Sequence[int]) -> Any:
    """Return a value of a config for the layers of the expanded model, if it is about layers."""
    if name in INDICES and isinstance(value, list | tuple):
        return [index for index, source in enumerate(origin) if source in value]
    if name in FIRST and isinstance(value, int):
        return max(0, value - layers) + sum(source < value for source in origin)
    if name in LAST and isinstance(value, int):
        return sum(source >= layers - value for source in origin)
    if name in BY_INDEX and isinstance(value, dict):
        return {str(index): value[str(source)] for index, source in enumerate(origin) if str(source) in value}
    if isinstance(value, list | tuple) and len(value) == layers and not name.endswith(("_id", "architectures")):
        return [value[source] for source in origin]
    return value


def _explicit_experts(text: Any, origin: Sequence[int]) -> dict[str, Any]:
    """Layers that have experts at every so many layers, by index instead."""
    step, dense = getattr(text, "decoder_sparse_step", None), getattr(text, "mlp_only_layers", None)
    if not step or dense is None:
        return {}
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, source in enumerate(origin) if source in dense or (source + 1) % step],
    }


def check_expanded(model: Any, expanded: Any, new: int) -> None:
    """Refuse a model whose config cannot say that a new layer is of the kind of the layer that it copies.

    Args:
        model: the model, which may have no weights.
        expanded: the one of the expanded config, likewise.
        new: number of new layers.

    Raises:
        RequestError: a layer is of another kind, or something else than the layers depends on their number.
    """
    name, remedy = type(model).__name__, "remove model.new_layers"
    (prefix, count), layers = decoder_layers(model), expanded.get_submodule(decoder_layers(expanded)[0])
    former = [list(_kind(layer)) for layer in model.get_submodule(prefix)]
    for index, source in enumerate(origins(count, new)):
        if list(_kind(layers[index])) != former[source]:
            raise RequestError(
                f"model.new_layers={new} copies layers, but layer {index} of the expanded {name} would differ from layer "
                f"{source} of the model, because the type of a layer depends on its position; {remedy}"
            )
    shapes = [
        {key: tuple(weight.shape) for key, weight in one.named_parameters() if not key.startswith(f"{prefix}.")}
        for one in (model, expanded)
    ]
    for key, shape in shapes[0].items():
        if shapes[1].get(key) != shape:
            raise RequestError(
                f"model.new_layers={new} inserts layers, but {name} has per-layer weights outside the layers ({key}); {remedy}"
            )


def _kind(layer: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Yield everything that defines a layer, except its position: its modules, their settings, the shapes of weights."""
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple | None.__class__)
            and not key.startswith("_")
            and not any(part in key for part in ("idx", "index", "layer_id", "layer_number", "training"))
        }
        yield name, type(module), settings
    for name, weight in (*layer.named_parameters(), *layer.named_buffers()):
        yield name, tuple(weight.shape), weight.dtype
