"""Floating-point operations of a training, as transformers counts them, and more closely."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from raysft.train.flops import model_flops, trainer_flops
from tests.tiny import FAMILIES, tiny_mixture, tiny_model


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_computes_each_token_with_some_of_its_experts(tmp_path, family):
    tiny_mixture(tmp_path / "m", family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    weights = [
        (name, weight) for name, weight in model.named_parameters() if "embed" not in name and "lm_head" not in name
    ]
    experts = [weight for name, weight in weights if ".experts." in name]
    others = sum(weight.numel() for name, weight in weights if ".experts." not in name)
    chosen = sum(2 * weight[0].numel() for weight in experts)
    assert 0 < chosen < sum(weight.numel() for weight in experts)
    assert model_flops(model, 10, 0, 0) == pytest.approx(10 * 6 * (others + chosen))


def test_a_module_that_an_adapter_trains_in_full_counts_once(tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", tie_word_embeddings=False)
    head = model.lm_head.weight.numel()
    body = sum(weight.numel() for weight in model.parameters()) - 2 * head
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    lora = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad) - 2 * head
    assert model_flops(adapted, 10, 0, 3) == 10 * (4 * body + 6 * lora) + 3 * 6 * head
