"""The routers of a mixture of experts, which send each token to some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from raysft.models.transformers_internals import recorded_outputs

READABLE = ("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe")
"""Kinds of models whose routers' outputs are tested: others may use a sigmoid instead of a softmax, or return something else."""


def routers(model: Any) -> set[str]:
    """Return the names of the modules that route tokens to experts, in a mixture of experts.

    transformers marks those whose output are a model's router logits. Where it marks a whole block, or does not know the model,
    the router is the module with a router's name inside it or next to the experts. The gate of a shared expert also counts.
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


def watchable_routers(model: Any) -> list[nn.Module]:
    """Return the modules whose output says how likely each expert is for each token, and which were chosen; none for other models.

    They are those that transformers marks, with their own weights: where it marks a whole block, its output says less.
    """
    marked = tuple(_marked(model))
    return [
        module
        for module in model.modules()
        if marked and isinstance(module, marked) and getattr(module, "weight", None) is not None
    ]


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
