"""Decoder layers as compiled code: ``train.compile``.

Each layer is compiled separately, as torchtitan does: the layers of a model are alike, so one small graph serves all of them.
Rows differ in width, so the graph takes any. Passes without gradients (evaluations, the checks at the start, a frozen
reference) compute as before: their numbers stay the same to the last bit, and nothing is compiled for them.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from raysft.errors import RequestError, one_line
from raysft.models.attention import keep_uncompiled, without_adapters
from raysft.models.decoder_layers import decoder_layers
from raysft.models.peft_internals import parameter_adapters
from raysft.models.torch_internals import allow_graphs, mark_dynamic
from raysft.models.transformers_internals import recomputation_of, without_recomputation

REMEDY = "set train.compile=false"
BACKEND = "inductor"
"""The torch.compile backend."""
TOKENS = {
    "hidden_states": (-2,), "attention_mask": (-2, -1), "position_ids": (-1,), "position_embeddings": (-2,),
    "cu_seq_lens_q": (-1,), "cu_seq_lens_k": (-1,),
}  # fmt: skip
"""Arguments of layers in transformers → their dimensions that vary between rows."""


def check_compiler(device: torch.device) -> None:
    """Check that torch can compile code for the device, by compiling something small.

    Raises:
        RequestError: it cannot.
    """
    kind = "C" if device.type == "cuda" else "C++"  # Triton compiles the launchers of its kernels
    variable, usual = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++",))
    asked = os.environ.get(variable)
    if not any(shutil.which(each) for each in ((asked,) if asked else usual)):
        raise RequestError(
            f"train.compile=true needs a {kind} compiler on every node, but there is no {asked or usual[0]}; "
            f"install it, or {REMEDY}"
        )
    numbers = torch.linspace(-1, 1, 64, device=device, requires_grad=True)
    try:
        torch.compile(_little, backend=BACKEND)(numbers).backward()
    except Exception as error:  # of any type: raised by compilers, their headers and drivers
        raise RequestError(
            f"train.compile=true, but torch.compile fails on this node ({type(error).__name__}: {one_line(error):.300}); {REMEDY}"
        ) from None


def _little(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.sin().square().sum()


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Let the decoder layers of a model, with or without peft's adapters, compute with compiled code where gradients are needed.

    Weight names stay, and so do the hooks of the layers themselves, which run around the compiled code, and recomputation,
    which calls it again. Hooks inside a layer are compiled with it, so what ZeRO-3 gathers must be gathered for whole layers
    (``layers_of``).

    Raises:
        RequestError: torch cannot compile code for the device, or the model has no list of layers.
    """
    layers = layers_of(model)
    check_compiler(device)
    torch.compiler.reset()  # what an earlier training run in this process compiled counts against torch's limit
    keep_uncompiled(without_adapters(model).get_decoder())
    # peft gives experts with an adapter a new class in each pass, so the code would never fit the next one.
    for experts in parameter_adapters(model):
        experts.forward = torch.compiler.disable(experts.forward)
    # Layers that differ in a size or a setting need a graph each, and the first one needs another if its input has no gradient.
    allow_graphs(2 * len(layers))
    for layer in layers:
        layer.forward = _compiled(layer)  # type: ignore[method-assign]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that are compiled."""
    base = without_adapters(model)
    return list(base.get_submodule(decoder_layers(base)[0]))


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    forward, plain = layer.forward, without_recomputation(layer)
    compiled = torch.compile(plain, backend=BACKEND)
    names = list(inspect.signature(plain).parameters)

    @wraps(forward)
    def compute(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        _mark_tokens({**dict(zip(names, inputs, strict=False)), **options})
        recompute = recomputation_of(layer)
        return recompute(partial(compiled, **options), *inputs) if recompute else compiled(*inputs, **options)

    return compute


def _mark_tokens(inputs: Mapping[str, Any]) -> None:
    """Tell the compiler which dimensions count tokens.

    Other dimensions that happen to have the same size, such as a head's, would otherwise be taken for them.
    """
    for name, dimensions in TOKENS.items():
        value = inputs.get(name)
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, torch.Tensor):
                mark_dynamic(tensor, [tensor.ndim + each for each in dimensions if tensor.ndim + each >= 0])
