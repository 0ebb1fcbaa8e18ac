"""KTransformers' kernel, where its package is installed and the CPU has what it needs."""

from __future__ import annotations

from typing import Any

import pytest

from raysft.errors import RequestError
from raysft.models.kt_internals import check_kernel

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
"""Of a ``tiny_mixture`` with sizes that the kernel can compute."""
QWEN: dict[str, Any] = {**SIZES, "num_experts": 8, "moe_intermediate_size": 64}


def _lacks() -> str:
    try:
        check_kernel()
    except RequestError as error:
        return str(error)
    return ""


LACKS = _lacks()
"""Why there is no kernel here; empty if there is."""
needs_kernel = pytest.mark.skipif(bool(LACKS), reason=LACKS)
