"""Layers of a decoder that compute as their authors wrote them, in fewer passes over memory, for training in float32 on CPUs.

torch runs each operator of a layer separately: it reads its inputs from memory and writes a new tensor, and the gradient does the
same in reverse. On a CPU that takes almost half of a step. Here everything between two large products is one function with its
own gradient, which computes in place: a linear layer with LoRA, RMSNorm, the rotary embedding and SwiGLU. A compiler would
fuse more, but takes longer than a short training. Results and gradients differ by rounding, in the tests by less than 1e-5 of
the largest.

Other authors' models have layers that look like Llama's but compute something else, such as dropout or limits, so a layer is
fused only if its class has exactly the source of Llama's, and it agrees with its function on a few numbers. Without a gradient,
the original computes, so evaluations give the same numbers to the last bit.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from functools import lru_cache, wraps
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from raysft.models.fused_functions import LoraLinear, RmsNorm, Rotary, SwiGlu
from raysft.models.torch_internals import has_hooks, is_fake

ROTARY = "apply_rotary_pos_emb"
"""The name that the modules of transformers' models give to the function that rotates queries and keys."""


def fuse_layers(model: nn.Module) -> None:
    """Fuse the layers of a float32 model on a CPU, with or without peft's adapters; its weights and their names stay.

    Hooks must be there already: one that is registered later on a part of a fused layer (an activation, or the matrices of LoRA)
    does not run. ZeRO-3 must not have partitioned the weights: it gathers them only for modules that are called.
    """
    for module in model.modules():
        for matches, forward in ((_is_lora, _lora_forward), (_is_rms_norm, _norm_forward), (_is_swiglu, _mlp_forward)):
            if matches(module):
                module.forward = MethodType(forward, module)
    for source in {type(module).__module__ for module in model.modules()}:
        _fuse_rotary(sys.modules.get(source))


def _is_lora(layer: Any) -> bool:
    """Return True for a layer with one plain LoRA: no dropout, no bias of its own, and nothing that peft computes besides."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or list(layer.lora_A) != list(layer.active_adapters) or len(layer.lora_A) != 1:
        return False
    (name,) = layer.lora_A
    base, a, b = layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name]
    return (
        all(type(part) is nn.Linear for part in (base, a, b))
        and all(_is_untouched(part) for part in (layer, base, a, b, layer.lora_dropout[name]))
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        and _is_frozen(base)
        and _is_float32(layer)
    )


def _lora_forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    base, names = layer.get_base_layer(), layer.active_adapters
    plain = (
        not (arguments or options or layer.disable_adapters or layer.merged) and len(names) == 1 and _is_frozen(base)
    )
    if not plain or not _trains(x, layer.lora_A[names[0]], layer.lora_B[names[0]]):
        return type(layer).forward(layer, x, *arguments, **options)  # type: ignore[no-any-return]
    a, b = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
    return LoraLinear.apply(x, base.weight, base.bias, a, b, layer.scaling[names[0]])  # type: ignore[no-any-return]


def _is_frozen(base: Any) -> bool:
    """Return True if neither the weight nor the bias is trained: the fused function has gradients for neither."""
    return not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)


def _is_rms_norm(norm: Any) -> bool:
    if not _is_like(norm, "LlamaRMSNorm") or not _is_float32(norm):
        return False
    weight, epsilon = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float):
        return False
    x = _numbers(3, len(weight))
    return _same(lambda: type(norm).forward(norm, x), lambda: RmsNorm.apply(x, weight, epsilon))


def _norm_forward(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if not _trains(hidden_states):
        return type(norm).forward(norm, hidden_states)  # type: ignore[no-any-return]
    return RmsNorm.apply(hidden_states, norm.weight, norm.variance_epsilon)  # type: ignore[no-any-return]


def _is_swiglu(mlp: Any) -> bool:
    from peft.tuners.lora import Linear
    from transformers.activations import ACT2FN

    if not _is_like(mlp, "LlamaMLP") or not _is_float32(mlp):
        return False
    products = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    activation: Any = getattr(mlp, "act_fn", None)
    if not all(type(product) in (nn.Linear, Linear) for product in products):
        return False
    if type(activation) not in (nn.SiLU, type(ACT2FN["silu"])) or not _is_untouched(activation):
        return False
    x = _numbers(3, 64)
    # Without the products, whose adapters may draw a dropout.
    parts = SimpleNamespace(gate_proj=lambda x: x, up_proj=torch.cos, down_proj=torch.neg, act_fn=activation)
    return _same(lambda: type(mlp).forward(parts, x), lambda: -SwiGlu.apply(x, x.cos()))


def _mlp_forward(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    if not _trains(x, mlp):
        return type(mlp).forward(mlp, x)  # type: ignore[no-any-return]
    return mlp.down_proj(SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-any-return]


def _fuse_rotary(source: Any) -> None:
    """Replace the function by which the models of a module of transformers rotate queries and keys.

    Other models of that module in this process use it too, where they are trained.
    """
    original = getattr(source, ROTARY, None)
    if not isinstance(original, FunctionType) or not _is_rotary(original):
        return

    @wraps(original)
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *arguments: Any, **options: Any) -> Any:
        full = q.shape[-1] == k.shape[-1] == cos.shape[-1]  # else a part of each head is not rotated
        usual = full and not arguments and not options and not cos.requires_grad and not sin.requires_grad
        if not usual or not all(_trains(x) for x in (q, k)) or not cos.dtype == sin.dtype == q.dtype:
            return original(q, k, cos, sin, *arguments, **options)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)

    setattr(source, ROTARY, rotate)


def _is_rotary(function: FunctionType) -> bool:
    half = function.__globals__.get("rotate_half")
    if not _is_source_of(function, ROTARY) or not _is_source_of(half, "rotate_half"):
        return False
    q, k, cos, sin = (_numbers(*shape) for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8)))
    return _same(
        lambda: torch.cat(function(q, k, cos, sin), 1),
        lambda: torch.cat([Rotary.apply(each, cos[:, None], sin[:, None]) for each in (q, k)], 1),
    )


def _is_like(module: nn.Module, name: str) -> bool:
    """Return True if a module computes by the source of this class of Llama's, and nothing else runs with it."""
    return _is_untouched(module) and _is_source_of(type(module).forward, f"{name}.forward")


def _is_untouched(module: nn.Module) -> bool:
    """Return True if calling the module runs its class's ``forward`` alone."""
    return "forward" not in vars(module) and not has_hooks(module)


def _is_float32(module: nn.Module) -> bool:
    return all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in module.parameters())


def _is_source_of(function: Any, name: str) -> bool:
    """Return True if the function has the source of this one of transformers' module of Llama; False if it has no source."""
    source = _source(function)
    return source is not None and source == _source_of_llama(name)


@lru_cache
def _source_of_llama(name: str) -> str | None:
    from transformers.models.llama import modeling_llama

    function: Any = modeling_llama
    for part in name.split("."):
        function = getattr(function, part)
    function = inspect.unwrap(function)  # from what this module may have put in its place
    return (
        _source(function) if function.__module__ == modeling_llama.__name__ else None
    )  # else somebody has replaced it


@lru_cache
def _source(function: Any) -> str | None:
    if not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        return None  # a wrapper shows the source of what it wraps
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, SyntaxError):
        return None


def _numbers(*shape: int) -> torch.Tensor:
    """Numbers to ±30, without a draw from torch's own generator, on which the training depends."""
    return cast(torch.Tensor, torch.arange(1.0, 1 + torch.Size(shape).numel()).sin().mul(30).view(shape))


@torch.no_grad()
def _same(one: Callable[[], Any], other: Callable[[], Any]) -> bool:
    """Return True if both compute the same numbers, which are not all 0."""
    try:
        ours, theirs = one(), other()
        if is_fake(ours):
            return True  # as in an estimate of memory, which trusts the source
        return bool(theirs.any() and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())
    except Exception:
        return False  # a layer that takes something else, so it computes something else


def _trains(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Return True if a gradient in float32 is wanted of the input, or of a weight of these modules."""
    if not torch.is_grad_enabled() or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return x.requires_grad or any(weight.requires_grad for module in modules for weight in module.parameters())
