"""Attention example by example, against each example alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from raysft.config import parse
from raysft.records import RunFailed
from raysft.train import attention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def config(**model):
    return parse(
        {
            "model": {"path": "m", "dtype": "float32", **model},
            "data": {"train": [{"name": "d", "path": "d.jsonl"}], "sequence_length": 16},
        }
    )


def made(described) -> torch.nn.Module:
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")


def positions(*lengths: int) -> list[int]:
    return [place for length in lengths for place in range(length)]


@pytest.mark.parametrize("described", [LlamaConfig(**SIZES), Qwen2Config(**SIZES), MistralConfig(**SIZES)])
def test_packed_rows_are_their_examples_alone(described):
    model = made(described)
    ids = torch.randint(0, 64, (2, 16))
    rows = [(5, 1, 8, 2), (16,)]
    alone = torch.zeros(2, 16, 64)
    for row, lengths in enumerate(rows):
        at = 0
        for length in lengths:
            alone[row, at : at + length] = model(ids[row : row + 1, at : at + length]).logits[0]
            at += length
    alone.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == attention.EXAMPLEWISE
    packed = model(ids, position_ids=torch.tensor([positions(*row) for row in rows]), use_cache=False).logits
    torch.testing.assert_close(packed, alone.detach(), rtol=1e-5, atol=1e-6)
    packed.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_a_window_narrower_than_a_row_keeps_the_mask():
    model = made(MistralConfig(**SIZES, sliding_window=8))
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == "sdpa"
    model = made(MistralConfig(**SIZES, sliding_window=16))
    attention.use_examplewise(model, config())
    assert model.config._attn_implementation == attention.EXAMPLEWISE


def test_who_names_a_kernel_gets_it():
    model = made(LlamaConfig(**SIZES))
    attention.use_examplewise(model, config(attention="sdpa"))
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_do_not_say_where_examples_begin_are_refused():
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(RunFailed, match=r"model\.attention=sdpa"):
        attention.examplewise(torch.nn.Identity(), states, states, states, None)
