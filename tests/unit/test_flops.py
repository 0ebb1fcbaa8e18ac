"""Floating-point operations of a training, as transformers counts them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from raysft.train.flops import trainer_flops
from tests.tiny import tiny_model


def counted(model, tokens: int) -> float:
    """What a ``Trainer`` adds to ``total_flos`` for a batch without padding."""
    return Trainer.floating_point_ops(
        SimpleNamespace(model=model), {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    )  # pyright: ignore


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_flops_are_those_of_a_trainer(tmp_path, tied, adapter):
    tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", tie_word_embeddings=tied)
    if adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert trainer_flops(model, 37) == counted(model, 37) > 0


def test_two_weights_of_four_bits_are_two(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_model(tmp_path / "m")
    options = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=options, device_map="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert trainer_flops(model, 3) == counted(model, 3) == trainer_flops(whole, 3)
