"""Layers of a decoder that compute as their authors wrote them, in fewer passes over memory, for training in float32 on CPUs.

torch runs each operator of a layer by itself: it reads its inputs from memory and writes a new tensor, and the gradient does the
same in reverse. On a CPU that takes almost half of a step. Here what lies between two large products is one function with a
gradient of its own, which computes in place: a linear layer with LoRA, RMSNorm, the rotary embedding and SwiGLU. A compiler would
fuse more, but takes longer than a short training. Only the order of rounding differs.

A function replaces what it was compared with on a few numbers, and where a gradient is wanted; evaluations compute as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from raysft.models.fused_functions import LoraLinear, RmsNorm, Rotary, SwiGlu

ROTARY = "apply_rotary_pos_emb"
"""The name that the modules of transformers' models give to the function that rotates queries and keys."""
ROTARY_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


def fuse_layers(model: nn.Module) -> None:
    """Fuse the layers of a float32 model on a CPU, with or without peft's adapters; its weights and their names stay.

    ZeRO-3 must not have partitioned the weights: it gathers them only for modules that are called.
    """
    for layer in _lora_layers(model):
        layer.forward = MethodType(_lora_forward, layer)
    for kind, forward, matches in (("RMSNorm", _norm_forward, _is_rms_norm), ("MLP", _mlp_forward, _is_swiglu)):
        for alike in _by_class(model, kind):
            if matches(alike[0]):
                for module in alike:
                    module.forward = MethodType(forward, module)
    for source in {type(module).__module__ for module in model.modules()}:
        _fuse_rotary(sys.modules[source])


def _lora_layers(model: nn.Module) -> Iterable[Any]:
    """Yield the layers with one plain LoRA: no dropout, no bias of its own, and nothing that peft computes besides."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if (
            type(layer) is not Linear
            or type(layer.get_base_layer()) is not nn.Linear
            or len(layer.active_adapters) != 1
        ):
            continue
        (name,) = layer.active_adapters
        weights = [layer.get_base_layer().weight, *layer.lora_A.parameters(), *layer.lora_B.parameters()]
        plain = (
            list(layer.lora_A) == [name]
            and isinstance(layer.lora_dropout[name], nn.Identity)
            and name not in layer.lora_variant
            and not layer.lora_bias[name]
            and not weights[0].requires_grad
        )
        if plain and all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights):
            yield layer


def _lora_forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    if arguments or options or layer.disable_adapters or layer.merged or not _trains(x, torch.is_grad_enabled()):
        return type(layer).forward(layer, x, *arguments, **options)  # type: ignore[no-any-return]
    (name,) = layer.active_adapters
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[name])  # type: ignore[no-any-return]


def _by_class(model: nn.Module, ending: str) -> list[list[Any]]:
    """Group the modules whose class's name ends like this by their class."""
    groups: dict[type, list[Any]] = {}
    for module in model.modules():
        if type(module).__name__.endswith(ending):
            groups.setdefault(type(module), []).append(module)
    return list(groups.values())


def _is_rms_norm(norm: Any) -> bool:
    weight = getattr(norm, "weight", None)
    if not hasattr(norm, "variance_epsilon") or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return False
    x = _numbers(3, len(weight))
    return _same(lambda: norm(x), lambda: RmsNorm.apply(x, weight, norm.variance_epsilon))


def _norm_forward(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if not _trains(hidden_states, hidden_states.requires_grad):
        return type(norm).forward(norm, hidden_states)  # type: ignore[no-any-return]
    return RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[no-any-return]


def _is_swiglu(mlp: Any) -> bool:
    if list(inspect.signature(type(mlp).forward).parameters) != ["self", "x"]:
        return False
    if not all(isinstance(getattr(mlp, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    x, training = _numbers(3, getattr(mlp.gate_proj, "in_features", 0)), mlp.training
    mlp.eval()  # without an adapter's dropout
    same = _same(lambda: mlp(x), lambda: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    mlp.train(training)
    return same


def _mlp_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if not _trains(gate, gate.requires_grad and up.requires_grad):
        return mlp.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]
    return mlp.down_proj(SwiGlu.apply(gate, up))  # type: ignore[no-any-return]


def _fuse_rotary(source: Any) -> None:
    """Replace the function by which the models of a module of transformers rotate queries and keys.

    Other models of that module in this process use it too, where they are trained.
    """
    original = getattr(source, ROTARY, None)
    if original is None or hasattr(original, "__wrapped__") or not _is_rotary(original):
        return

    @wraps(original)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *arguments: Any, **options: Any) -> Any:
        full = q.shape[-1] == k.shape[-1] == cos.shape[-1]  # else a part of each head is not rotated
        if arguments or options or not full or not _trains(q, q.requires_grad and k.requires_grad):
            return original(q, k, cos, sin, *arguments, **options)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)

    setattr(source, ROTARY, rotate)


def _is_rotary(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters
    if list(parameters) != ROTARY_PARAMETERS or parameters["unsqueeze_dim"].default != 1:
        return False
    q, k, cos, sin = (_numbers(*shape) for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8)))
    return _same(
        lambda: torch.cat(function(q, k, cos, sin), 1),
        lambda: torch.cat([Rotary.apply(each, cos[:, None], sin[:, None]) for each in (q, k)], 1),
    )


def _numbers(*shape: int) -> torch.Tensor:
    """Numbers that differ, without a draw from torch's own generator, on which the training depends."""
    return cast(torch.Tensor, torch.arange(1.0, 1 + torch.Size(shape).numel()).sin().view(shape))


@torch.no_grad()
def _same(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Return True if both compute the same numbers, which are not all 0."""
    try:
        ours, theirs = one(), other()
        return bool(theirs.any() and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())
    except Exception:
        return False  # a layer that takes something else, so it computes something else


def _trains(x: torch.Tensor, wants_gradient: bool) -> bool:
    return wants_gradient and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
