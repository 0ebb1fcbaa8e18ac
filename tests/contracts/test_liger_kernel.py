"""liger-kernel: the function that patches a model that is loaded already."""

from __future__ import annotations

import pytest

from tests.contracts.contract import Contract

LIGER = Contract("liger-kernel", "raysft/train/finetuning.py")


def test_a_loaded_model_can_be_patched():
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    LIGER.parameters(LIGER.name(liger, "_apply_liger_kernel_to_instance"), ["model"])
