"""KTransformers' kernel for experts: what raysft uses of the package kt-kernel, which documents none of it, in one place.

``tests/contracts/test_kt_kernel.py`` checks that it exists. The kernel computes in bfloat16 on CPUs and needs no CUDA. Its package
pins another version of torch and brings copies of sgl_kernel, deep_gemm and others, so it is not an extra of raysft.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from raysft.errors import RequestError, one_line

VERSION = "0.7.2"
"""The version with which raysft is tested."""
MULTIPLE = 32
"""What the sizes of the experts must be multiples of."""


_NUMBERS = itertools.count()
"""Numbers of layers: a second one with the same number, also of another model, ends the process."""


class Factors(NamedTuple):
    """LoRA of a layer's experts, or its gradients: A [experts, rank, inputs] and B [experts, outputs, rank] of each product."""

    gate_a: torch.Tensor
    gate_b: torch.Tensor
    up_a: torch.Tensor
    up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a layer's experts."""

    experts: int
    chosen: int
    """Experts of a token."""
    hidden: int
    inner: int
    """Width of an expert."""


def check_kernel(on_this_machine: bool = True) -> None:
    """Refuse to continue without the kernel.

    Args:
        on_this_machine: also look whether this machine's CPU has what the kernel needs.

    Raises:
        RequestError: the package is missing or another version, or the CPU lacks instructions.
    """
    if importlib.util.find_spec("kt_kernel") is None:
        raise RequestError(
            f"model.experts=kt needs the package kt-kernel; run pip install --no-deps kt-kernel=={VERSION} on every node: with its "
            "dependencies, which are optional here, it would replace torch"
        )
    with suppress(PackageNotFoundError):  # one that was built here may have none
        if (found := version("kt-kernel")).split(".")[:2] != VERSION.split(".")[:2]:
            raise RequestError(
                f"model.experts=kt works with kt-kernel {VERSION}, but {found} is installed; run pip install --no-deps "
                f"kt-kernel=={VERSION} on every node"
            )
    if not on_this_machine:
        return
    try:
        kt_kernel: Any = importlib.import_module("kt_kernel")
        kernels = kt_kernel.kt_kernel_ext.moe
    except (ImportError, RuntimeError, AttributeError) as error:  # RuntimeError: it was built for a newer CPU
        raise RequestError(
            f"model.experts=kt: the package kt-kernel cannot be loaded on this node ({one_line(error)}); run pip install --no-deps "
            f"kt-kernel=={VERSION} there, or set model.experts=auto"
        ) from None
    if not hasattr(kernels, "AMXBF16_SFT_MOE"):
        raise RequestError(
            "model.experts=kt needs a CPU with AVX-512 BF16 (Intel Sapphire Rapids, AMD Zen 4, or later), but kt-kernel found "
            f"{kt_kernel.__cpu_variant__} on this node; use such nodes, or set model.experts=auto with train.zero_stage=3"
        )


class Kernel:
    """The experts of one layer in the kernel, which has its own copy of their weights.

    It keeps what a backward pass needs of the last forward pass that asked for it.

    Args:
        sizes: of the experts.
        rank: of ``factors``.
        tokens: most tokens of a call.
        threads: that compute.
        pools: NUMA nodes over which threads and weights are spread.
        one_layer: True if a layer's backward pass follows its forward pass before that of another layer. What is kept then has
            the same place for all layers.
    """

    def __init__(self, sizes: ExpertSizes, rank: int, tokens: int, threads: int, pools: int, one_layer: bool) -> None:
        from kt_kernel.sft.amx import AMXSFTMoEWrapper  # pyright: ignore[reportMissingImports]
        from kt_kernel.sft.base import KExpertsSFTBuffer  # pyright: ignore[reportMissingImports]

        KExpertsSFTBuffer.clear_cache()  # which all layers share, and which may have the sizes of another model
        self.tokens = tokens
        self._inner: Any = AMXSFTMoEWrapper(
            layer_idx=next(_NUMBERS),
            num_experts=sizes.experts,
            num_experts_per_tok=sizes.chosen,
            hidden_size=sizes.hidden,
            moe_intermediate_size=sizes.inner,
            num_gpu_experts=0,
            cpuinfer_threads=threads,
            threadpool_count=pools,
            weight_path="",
            chunked_prefill_size=tokens,
            lora_rank=rank,
            lora_alpha=float(rank),  # so that B is not scaled; whoever fills the factors scales it
            max_cache_depth=1,
            method="AMXBF16_SFT",
        )
        # The weights in the order of the backward pass are made for one layer at a time, or all would be there twice.
        self._inner.share_backward_bb = True
        self._inner.share_cache_pool = one_layer
        self.factors, self.gradients = _factors(sizes, rank), _factors(sizes, rank)

    def load(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Copy the weights of all experts: [experts, 2 · inner, hidden], gates first, and [experts, hidden, inner]."""
        gate, up = (half.to("cpu", torch.bfloat16).contiguous() for half in gate_up.detach().chunk(2, dim=1))
        down = down.detach().to("cpu", torch.bfloat16).contiguous()
        self._inner.load_weights_from_tensors(gate, up, down, torch.arange(len(gate)))
        gradients = {f"grad_{name}": value for name, value in _lora(self.gradients).items()}
        self._inner.init_lora_weights(**_lora(self.factors), **gradients)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, keep: bool) -> torch.Tensor:
        """Return the experts' sum for each token, in bfloat16 on the tokens' device.

        Args:
            hidden: [tokens, hidden].
            index: experts of each token [tokens, chosen].
            weights: of these experts [tokens, chosen].
            keep: keep what a backward pass needs.
        """
        self._inner.update_lora_weights()
        return self._inner.forward(hidden, index, weights, save_for_backward=keep, output_device=_other(hidden))

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of ``hidden`` and ``weights`` of the last forward pass, and replace ``gradients``."""
        return self._inner.backward(gradient, output_device=_other(gradient))


def _other(tensor: torch.Tensor) -> torch.device | None:
    """The device of a result; None for the CPU, where the kernel would hand out its own buffer."""
    return None if tensor.device.type == "cpu" else tensor.device


def _factors(sizes: ExpertSizes, rank: int) -> Factors:
    """Return zeros."""
    a = torch.zeros(2, sizes.experts, rank, sizes.hidden, dtype=torch.bfloat16)
    b = torch.zeros(2, sizes.experts, sizes.inner, rank, dtype=torch.bfloat16)
    down_a = torch.zeros(sizes.experts, rank, sizes.inner, dtype=torch.bfloat16)
    down_b = torch.zeros(sizes.experts, sizes.hidden, rank, dtype=torch.bfloat16)
    return Factors(a[0], b[0], a[1], b[1], down_a, down_b)


def _lora(factors: Factors) -> dict[str, torch.Tensor]:
    """Factors by their names in the kernel, ``gate_lora_a`` …"""
    return {name.replace("_", "_lora_"): value for name, value in factors._asdict().items()}
