"""Whole models in every data type: merged from adapters in float32 and rounded once, or written anew file by file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from raysft.models.merging import merge
from raysft.models.weight_types import stored_dtype
from tests.tiny import tiny_tokenizer

IDS = torch.arange(40)[None]
KINDS = ("llama", "qwen2", "gemma", "gpt2")
DTYPES = ("float32", "bfloat16", "float16")


def random_model(folder: Path, kind: str, draw: random.Random, dtype: str) -> Path:
    """Save a random model of a random small shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = draw.choice([1, 2, 4])
    sizes: dict[str, Any] = {
        "hidden_size": 8 * heads * draw.choice([1, 2]),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randint(1, 3),
        "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        sizes = {"n_embd": sizes["hidden_size"], "n_head": heads, "n_layer": sizes["num_hidden_layers"],
                 "initializer_range": 0.3, "n_positions": 64}  # fmt: skip
    else:
        sizes |= {"num_key_value_heads": draw.choice([1, heads]), "intermediate_size": draw.choice([24, 40]),
                  "head_dim": sizes["hidden_size"] // heads, "max_position_embeddings": 64}  # fmt: skip
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    torch.manual_seed(draw.randrange(2**30))
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_adapter(folder: Path, base: Path, draw: random.Random) -> Path:
    """Save an adapter of random numbers for a model; some of them train a whole module too."""
    from peft import LoraConfig, OFTConfig, get_peft_model

    torch.manual_seed(draw.randrange(2**30))
    whole = {"modules_to_save": draw.choice([None, ["lm_head"], ["embed_tokens", "wte"]])}
    shared: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **whole}
    kind = draw.choice(["lora", "dora", "rslora", "oft"])
    if kind == "oft" and loaded(base, "float32").config.model_type == "gpt2":
        kind = "lora"  # peft cannot rotate its layers
    settings = (
        OFTConfig(r=0, oft_block_size=4, **shared)
        if kind == "oft"
        else LoraConfig(r=draw.choice([1, 3]), use_dora=kind == "dora", use_rslora=kind == "rslora", **shared)
    )
    model: Any = get_peft_model(loaded(base, "float32"), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def with_adapters(base: Path, adapters: list[Path], merged: bool = False) -> Any:
    """The model with its adapters as peft computes it in float32."""
    from peft import PeftModel

    model: Any = loaded(base, "float32")
    for adapter in adapters:
        if merged and adapter is not adapters[0]:
            model = model.merge_and_unload()
        model = PeftModel.from_pretrained(model, adapter)
    return model


@pytest.mark.parametrize("seed", range(8))
def test_a_merged_model_computes_what_the_base_computes_with_the_adapters(tmp_path, seed):
    draw = random.Random(seed)
    kind, stored = KINDS[seed % len(KINDS)], draw.choice(DTYPES[:2])
    base = random_model(tmp_path / "base", kind, draw, stored)
    adapters = [random_adapter(tmp_path / f"a{index}", base, draw) for index in range(draw.randint(1, 2))]
    peft = with_adapters(base, adapters, merged=True)
    wanted = logits(peft)
    exact = {name: weight.detach() for name, weight in peft.merge_and_unload().named_parameters()}
    for dtype in DTYPES:
        output = tmp_path / dtype
        merge(base, output, dtype=dtype, adapters=adapters)
        description = json.loads((output / "config.json").read_text())
        assert description["dtype"] == dtype
        written = loaded(output, "auto" if dtype == "auto" else dtype)
        assert {weight.dtype for weight in written.parameters()} == {getattr(torch, dtype)}
        for name, weight in written.named_parameters():
            if dtype == "float32":
                torch.testing.assert_close(weight, exact[name], rtol=1e-5, atol=1e-6, msg=name)
            else:  # rounded once: at most half a unit in the last place away, beside the order of float32 sums
                half = torch.finfo(weight.dtype).eps / 2
                torch.testing.assert_close(weight.float(), exact[name], rtol=1.01 * half, atol=1e-6, msg=name)
        if dtype == "float32":
            torch.testing.assert_close(logits(written), wanted, rtol=1e-3, atol=1e-3)
    merge(base, tmp_path / "own", adapters=adapters)
    assert stored_dtype(tmp_path / "own") == stored, "the data type stays as it is"
