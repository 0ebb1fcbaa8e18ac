"""float32 matrix products of CPUs that torch's library holds back.

MKL, which multiplies for torch on a CPU, uses AVX-512 on Intel's processors only; oneDNN, which torch has as well and uses for
bfloat16, asks the processor what it can do. On an AMD EPYC 9005 it multiplies 2.2 times as fast (503 against 224 GFLOPS for
512 × 576 × 1536 on two cores), in true float32: only the order of the sums differs.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

SMALL = 1 << 18
"""Multiplications under which the call costs more than oneDNN saves."""


def use_onednn() -> bool:
    """Multiply float32 matrices of this process with oneDNN where MKL would not use the processor; says whether it does.

    The choice follows from the processor alone, never from a measurement: a run that goes on must compute as before.
    """
    return held_back() and _override() is not None


def held_back(hf_config: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this is a processor with AVX-512 that MKL does not take for one."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return wide and torch.backends.mkl.is_available() and "AuthenticAMD" in _read(hf_config)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # not Linux


@lru_cache(maxsize=1)
def _override() -> Any:
    """Put oneDNN behind ``aten::mm`` and ``aten::addmm``, to which linear layers and their gradients come down."""
    product: Any = torch.ops.mkldnn._linear_pointwise.default
    # The variants with ``out`` keep the kernels of their own.
    mm_as_before: Any = torch.ops.aten.mm.out
    addmm_as_before: Any = torch.ops.aten.addmm.out

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if _suits(a, b):
            return product(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]
        return mm_as_before(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # type: ignore[no-any-return]

    def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1) -> torch.Tensor:
        # oneDNN reads as many elements as there are columns, one behind the other.
        plain = bias.shape == b.shape[1:] and bias.is_contiguous() and bias.dtype == torch.float32
        if _suits(a, b) and plain and beta == 1 and alpha == 1:
            return product(a, b.t(), bias, "none", [], "")  # type: ignore[no-any-return]
        out = a.new_empty(a.shape[0], b.shape[1])
        return addmm_as_before(bias, a, b, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced, which is meant
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
