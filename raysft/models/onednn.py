"""Fast float32 matrix products on AMD CPUs.

MKL, which torch uses on CPUs, has AVX-512 kernels for Intel processors only. oneDNN, which torch includes and uses for bfloat16,
checks what the processor supports. On an AMD EPYC 9005 it is 2.2 times as fast (503 against 224 GFLOPS for 512 × 576 × 1536 on two
cores), in full float32: only the order of summation differs.

oneDNN multiplies by weights in its own layout, into which it copies them at every call. For the few rows of a generation step
that costs as much as the product, so ``pack_linear`` lays them out once, for inference.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

SMALL = 1 << 18
"""Number of multiplications below which the call costs more than oneDNN saves."""
FEW_ROWS, WIDE = 8, 1 << 19
"""Rows and weights of a layer from which packed weights are faster than MKL on a processor for which MKL has kernels too: 1.1
times (576 × 1536) to 1.4 times (576 × 49152) for 64 rows, but 0.75 times for one row."""


def use_onednn() -> bool:
    """Use oneDNN for float32 products in this process if MKL lacks kernels for the processor; returns True if it does.

    The choice depends only on the processor, never on a measurement, because a resumed run must compute as before.
    """
    return is_slow_with_mkl() and _override() is not None


def is_slow_with_mkl(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True if the processor has AVX-512, but MKL does not use it."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return wide and torch.backends.mkl.is_available() and "AuthenticAMD" in _read(cpuinfo)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux


@lru_cache(maxsize=1)
def _override() -> Any:
    """Replace ``aten::mm`` and ``aten::addmm``, which linear layers and their gradients call, with oneDNN."""
    product: Any = torch.ops.mkldnn._linear_pointwise.default
    # The ``out`` variants keep their own kernels.
    mm_as_before: Any = torch.ops.aten.mm.out
    addmm_as_before: Any = torch.ops.aten.addmm.out

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if _suits(a, b):
            return product(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]
        return mm_as_before(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # type: ignore[no-any-return]

    def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
        # oneDNN reads one contiguous element per column.
        plain = bias.shape == b.shape[1:] and bias.is_contiguous() and bias.dtype == torch.float32
        if _suits(a, b) and plain and beta == 1 and alpha == 1:
            return product(a, b.t(), bias, "none", [], "")  # type: ignore[no-any-return]
        out = a.new_empty(a.shape[0], b.shape[1])
        return addmm_as_before(bias, a, b, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the replaced kernel, which is intended
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    return library


def _suits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.dim() == b.dim() == 2
        and a.shape[0] * a.shape[1] * b.shape[1] > SMALL
        and a.shape[1] == b.shape[0]
    )


class PackedLinear(nn.Module):
    """A linear layer for inference whose float32 weight is in oneDNN's own layout.

    Its products are bit for bit those of oneDNN with the plain weight, from 8 rows on; for one row oneDNN has another kernel for
    plain weights.

    Args:
        layer: the layer to replace; it is not changed.
        rows: number of rows to choose the layout for; any other number is computed too.
    """

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), rows)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().contiguous())

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], a plain copy made at every access, for code that looks at it."""
        return self._packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in_features] → […, out_features]."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


def pack_linear(model: nn.Module, rows: int) -> int:
    """Replace the linear layers of a float32 model on a CPU with packed ones, for inference, where that is faster.

    One layer after another, so that no more than one weight exists twice. A weight that something else also uses, such as the
    embedding's, stays in addition to its packed copy.

    Args:
        rows: number of rows of most products: the sequences that are generated at the same time.

    Returns:
        The number of layers replaced.
    """
    least = _least_weights(rows)
    if least is None:
        return 0
    alike = _alike(model, least)
    for names in alike:
        packed = PackedLinear(cast(nn.Linear, model.get_submodule(names[0])), rows)
        for name in names:
            model.set_submodule(name, packed)
    return sum(map(len, alike))


def _alike(model: nn.Module, least: int) -> list[list[str]]:
    """Name the layers with at least this many weights, grouping those that share weight and bias.

    Names only: whoever held the layers would hold their weights until all are packed.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, layer in _plain_layers(model):
        if layer.weight.numel() >= least:
            names.setdefault((id(layer.weight), id(layer.bias)), []).append(name)
    return list(names.values())


def _least_weights(rows: int) -> int | None:
    """Number of weights from which a layer is packed; None if none is."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    if is_slow_with_mkl():
        return SMALL // rows + 1
    return WIDE if rows >= FEW_ROWS else None


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that are nothing but a product in float32, with their names; not those of an adapter, which are small."""
    for name, module in model.named_modules(remove_duplicate=False):
        # Subclasses (quantized layers, parametrizations) compute something else; a peft adapter's layers are in dictionaries.
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.device.type == "cpu":
            inside = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(inside, nn.ModuleDict):
                yield name, module
