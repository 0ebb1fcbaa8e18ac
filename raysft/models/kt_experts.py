"""Experts computed on the CPU by KTransformers' kernel: ``model.experts: kt``.

transformers calls one function for the experts of all architectures. Here it is a function with its own gradient around the
kernel, which has taken over the weights. Their adapter stays with peft, in float32 and on the model's device: its weights are
copied to the kernel before each pass, and their gradients are those of the function, so that ZeRO, checkpoints and the export
find what they always find. peft gives gates and ups one A together, the kernel one each: both get the same, and their gradients
are summed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from raysft.config import Config
from raysft.errors import RequestError
from raysft.models.attention import without_adapters
from raysft.models.kt_factors import Given, same_memory
from raysft.models.kt_internals import MULTIPLE, ExpertSizes, Kernel, check_kernel
from raysft.models.peft_internals import parameter_adapters
from raysft.models.transformers_internals import expert_modules, is_swiglu

NAME = "kt"
"""The name of the function in transformers."""
ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")
"""Kinds of models with which it is tested."""
LEAST_GATE = -88
"""Below about this (exp(88) is the largest power that float32 holds), the kernel has NaN for the gradient of a gate's SiLU, which
is 0, and so for those of the token's hidden states."""
RANKS = 8
"""What ranks in the kernel are multiples of; a smaller adapter is filled up with zeros, and so is none."""

_FIRST_PASS: ContextVar[bool] = ContextVar("first pass", default=False)
"""True while a layer computes that will compute again in the backward pass."""


def check_architecture(hf_config: Any) -> None:
    """Refuse a model whose experts the kernel is not tested with.

    Raises:
        RequestError: names its kind.
    """
    kind = hf_config.model_type
    if kind not in ARCHITECTURES:
        raise RequestError(
            f"model.experts=kt is tested with the experts of {', '.join(ARCHITECTURES)}, but the model is {kind}; set "
            "model.experts=auto"
        )
    text = hf_config.get_text_config()
    sizes = {"hidden_size": text.hidden_size, "moe_intermediate_size": _inner(text)}
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise RequestError(
                f"model.experts=kt computes with multiples of {MULTIPLE}, but the model's {name} is {size}; set model.experts=auto"
            )


def check_frozen(model: Any) -> None:
    """Refuse a model with adapters that trains experts in full, by themselves or in a module that holds them.

    Raises:
        RequestError: names the module.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in without_adapters(model).named_modules():
        if isinstance(module, ModulesToSaveWrapper) and expert_modules(module):
            raise RequestError(
                f"model.experts=kt keeps the experts frozen and trains their LoRA, but {name} is trained in full "
                "(model.lora.extra_modules, or modules_to_save of an adapter); name modules without experts, or set "
                "model.experts=auto"
            )


def _inner(text: Any) -> int:
    return int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)


def move_experts(model: Any, config: Config, taken_over: Callable[..., LayerExperts] | None = None) -> None:
    """Give the weights of a model's experts to the kernel, layer by layer, and let them compute there.

    Args:
        model: a transformers model on the CPU, with or without peft's adapters.
        config: the run's config.
        taken_over: makes of a layer's experts and their adapters what computes them. Default: the kernel.

    Raises:
        RequestError: the kernel is missing, or computes other experts than the model's.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    base = without_adapters(model)
    check_architecture(base.config)
    check_frozen(model)
    if taken_over is None:
        check_kernel()
        taken_over = partial(_in_kernel, config, base.config.get_text_config().num_experts_per_tok)
    adapters: dict[int, list[Any]] = {}
    experts = list(expert_modules(base))
    moved = {id(module) for module in experts}
    for adapter in parameter_adapters(model):
        if id(adapter.get_base_layer()) in moved:  # else it is a router's
            adapters.setdefault(id(adapter.get_base_layer()), []).append(adapter)
            adapter.forward = MethodType(_passed_on, adapter)
    for module in experts:
        if not is_swiglu(module):
            raise RequestError(
                f"model.experts=kt supports only SwiGLU without biases, but {type(module).__name__} is different; set "
                "model.experts=auto"
            )
        module.experts_of_layer = taken_over(module, adapters.get(id(module), []))
        for name in ("gate_up_proj", "down_proj"):
            setattr(module, name, nn.Parameter(getattr(module, name).new_empty(0), requires_grad=False))
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_forward)
    base.set_experts_implementation(NAME)


def _in_kernel(config: Config, chosen: int, module: Any, adapters: Sequence[Any]) -> LayerExperts:
    experts, hidden, inner = module.down_proj.shape
    tokens, recomputes = config.micro_batch_size * config.data.sequence_length, recomputes_all(config)
    kernel = Kernel(
        ExpertSizes(experts, chosen, hidden, inner),
        rank_in_kernel(adapters),
        tokens,
        torch.get_num_threads(),
        numa_nodes(inner),
        recomputes,
    )
    kernel.load(module.gate_up_proj, module.down_proj)
    return LayerExperts(kernel, adapters, _SHARED if recomputes else Kept(), 3 * experts * hidden * inner)


def rank_in_kernel(adapters: Sequence[Any]) -> int:
    """Return the rank that the kernel computes adapters with, of which there may be none."""
    rank = max((rank for adapter in adapters for rank in adapter.r.values()), default=RANKS)
    return -(-rank // RANKS) * RANKS


def recomputes_all(config: Config) -> bool:
    """Return True if every layer is computed again just before its backward pass, so that one at a time keeps something."""
    return config.train.gradient_checkpointing and config.train.recompute_layers is None


def elements_of_experts(model: Any) -> tuple[int, int]:
    """Return how many weights of experts the kernel has, of all layers and of one; the model's parameters no longer have them."""
    found = [module.experts_of_layer.elements for module in model.modules() if hasattr(module, "experts_of_layer")]
    return sum(found), max(found, default=0)


def numa_nodes(inner: int, folder: Path = Path("/sys/devices/system/node")) -> int:
    """Return over how many NUMA nodes to spread the experts: all that this process may use, if their width can be divided so.

    Args:
        inner: width of an expert.
        folder: where Linux describes the nodes.
    """
    allowed = os.sched_getaffinity(0)
    nodes = 0
    while allowed and allowed & _cpus(folder / f"node{nodes}" / "cpulist"):
        nodes += 1
    return nodes if nodes and inner % (nodes * MULTIPLE) == 0 else 1


def _cpus(file: Path) -> set[int]:
    try:
        ranges = [part.split("-") for part in file.read_text().strip().split(",") if part]
    except OSError:
        return set()
    return {cpu for each in ranges for cpu in range(int(each[0]), int(each[-1]) + 1)}


def recomputation_contexts() -> tuple[Any, Any]:
    """Contexts for ``torch.utils.checkpoint``: in the first pass of a layer nothing is kept, as the second one follows."""
    return _first_pass(), nullcontext()


@contextmanager
def _first_pass() -> Iterator[None]:
    before = _FIRST_PASS.set(True)
    try:
        yield
    finally:
        _FIRST_PASS.reset(before)


def _passed_on(adapter: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """Call the experts without adding the adapter to their weights: the kernel computes it separately."""
    return adapter.base_layer(x, *arguments, **options)


def _experts_forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    layer: LayerExperts = module.experts_of_layer
    scales, factors = layer.adapter()
    inputs = (hidden, weights, *(factor for factor in factors if factor is not None))
    keep = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    result: torch.Tensor = _Experts.apply(layer, keep, scales, hidden, index, weights, *factors)  # type: ignore[assignment]
    return result


class Kept:
    """The forward pass of which a kernel, or all that share their place, has what a backward pass needs."""

    layer: LayerExperts | None = None
    inputs: tuple[torch.Tensor, ...] = ()
    """Hidden states, experts' indices and weights; they live as long as this, so that no others come to their place in memory."""
    given: Given | None = None


_SHARED = Kept()


class LayerExperts:
    """The experts of a layer in the kernel, with peft's adapters of them.

    Args:
        kernel: has their weights.
        adapters: of ``gate_up_proj`` and ``down_proj``, as far as there are any.
        kept: says what the kernel has kept.
        elements: of their weights.
    """

    def __init__(self, kernel: Any, adapters: Sequence[Any], kept: Kept, elements: int) -> None:
        self._kernel, self._kept, self.elements = kernel, kept, elements
        self._adapters = {adapter.parameter_name: adapter for adapter in adapters}

    def adapter(self) -> tuple[tuple[float, float], list[torch.Tensor | None]]:
        """Return the scales of the adapters that are in use, and their weights as peft has them: A, B of each product."""
        scales, factors = [], []
        for name in ("gate_up_proj", "down_proj"):
            adapter = self._adapters.get(name)
            used = [each for each in adapter.active_adapters if each in adapter.lora_A] if adapter is not None else []
            if adapter is None or adapter.disable_adapters or not used:
                scales.append(0.0)
                factors += [None, None]
            else:
                (active,) = used
                scales.append(adapter.scaling[active])
                factors += [adapter.lora_A[active].weight, adapter.lora_B[active].weight]
        return (scales[0], scales[1]), factors

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given, keep: bool
    ) -> torch.Tensor:
        """Compute the experts; ``keep`` what a backward pass needs, if all tokens fit into one call."""
        given.fill(self._kernel.factors)
        size = self._kernel.tokens
        keep = keep and len(hidden) <= size and not _FIRST_PASS.get()
        self._forget()  # also a pass that keeps nothing changes what the kernel has
        parts = zip(hidden.split(size), index.split(size), weights.split(size), strict=True)
        results = [self._kernel.forward(*part, keep=keep) for part in parts]
        if keep:
            self._kept.layer, self._kept.inputs, self._kept.given = self, (hidden, index, weights), given
        return results[0] if len(results) == 1 else torch.cat(results)

    def backward(
        self, gradient: torch.Tensor, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, given: Given
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Return the gradients of hidden states, of the experts' weights in the sum, and of the adapter's A and B."""
        given.fill(self._kernel.factors)
        kept = self._has_kept((hidden, index, weights), given)
        self._forget()
        size, of_hidden, of_weights = self._kernel.tokens, [], []
        sums = [None if factor is None else torch.zeros_like(factor, dtype=torch.float32) for factor in given.factors]
        parts = zip(*(each.split(size) for each in (gradient, hidden, index, weights)), strict=True)
        for part_gradient, *inputs in parts:
            if not kept:
                self._kernel.forward(*inputs, keep=True)
            of_part = self._kernel.backward(part_gradient.contiguous())
            of_hidden.append(of_part[0])
            of_weights.append(of_part[1])
            given.add(sums, self._kernel.gradients)
        hidden_gradient = torch.cat(of_hidden)
        # The kernel leaves a token out of the gradients of A where it has NaN for its hidden states (``LEAST_GATE``).
        nan_or_zero = (hidden_gradient.detach() * 0).sum()
        for each in sums:
            if each is not None:
                each.add_(nan_or_zero)
        return hidden_gradient, torch.cat(of_weights), sums

    def _has_kept(self, inputs: tuple[torch.Tensor, ...], given: Given) -> bool:
        kept = self._kept
        same = kept.given is not None and given.same(kept.given)
        return kept.layer is self and same and same_memory(kept.inputs, inputs)

    def _forget(self) -> None:
        self._kept.layer, self._kept.inputs, self._kept.given = None, (), None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: LayerExperts, keep: bool, scales: tuple[float, float], hidden: torch.Tensor,
        index: torch.Tensor, weights: torch.Tensor, *factors: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        ctx.layer, ctx.scales = layer, scales
        ctx.save_for_backward(hidden, index, weights, *factors)
        return layer.forward(hidden, index, weights, Given(scales, factors), keep).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, index, weights, *factors = ctx.saved_tensors
        given = Given(ctx.scales, factors)
        of_hidden, of_weights, of_factors = ctx.layer.backward(gradient, hidden, index, weights, given)
        found = [
            None if each is None or of_each is None else of_each.to(each.dtype)
            for each, of_each in zip(factors, of_factors, strict=True)
        ]
        return None, None, None, of_hidden.to(hidden.dtype), None, of_weights.to(weights.dtype), *found
