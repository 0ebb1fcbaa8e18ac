"""Whole models in every data type: merged from adapters in float32 and rounded once, or written anew file by file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from raysft.config import parse
from raysft.generate.engines.model import load_model
from raysft.models.adapters import load_with_base
from raysft.models.merging import merge
from raysft.models.weight_types import convert_parameters, own_dtype, stored_dtype
from tests.messages import refusal
from tests.tiny import tiny_mixture, tiny_model, tiny_tokenizer

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


@pytest.mark.parametrize(("kind", "settings"), [
    ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16}),
    ("mixtral", {"num_local_experts": 4}),
])  # fmt: skip
def test_fused_experts_are_merged_and_written_by_their_published_names(tmp_path, kind, settings):
    from raysft.train.finetuning import load_model

    base = tiny_mixture(tmp_path / "base", kind, **settings)
    config = parse({
        "model": {"path": str(base), "dtype": "float32", "lora": {"rank": 4}},
        "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64},
    })  # fmt: skip
    model: Any = load_model(config, str(base))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        merge(base, tmp_path / dtype, dtype=dtype, adapters=[tmp_path / "adapter"])
        assert stored_dtype(tmp_path / dtype) == dtype
        names = load_file(tmp_path / dtype / "model.safetensors").keys()
        assert names == load_file(base / "model.safetensors").keys()
        torch.testing.assert_close(logits(loaded(tmp_path / dtype, "float32")), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantized_base_stays_as_it_is(tmp_path, method):
    draw = random.Random(1)
    base = random_model(tmp_path / "base", "llama", draw, "float32")
    adapter = random_adapter(tmp_path / "adapter", base, draw)
    described = json.loads((base / "config.json").read_text())
    described["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(described))
    said = refusal(lambda: merge(base, tmp_path / "out", dtype="float32"))
    assert f"is quantized ({method}), so its weights cannot be converted to this type; remove it" in said
    said = refusal(lambda: merge(base, tmp_path / "out", adapters=[adapter]))
    assert (
        f"is quantized ({method}), so no adapter can be merged into it; keep the adapter unmerged (--no-merge)" in said
    )
    merge(base, tmp_path / "copied")
    assert (tmp_path / "copied" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_models_own_type_is_what_its_config_says_or_its_weights_have(tmp_path):
    base = tiny_model(tmp_path / "base")
    path = base / "config.json"
    described = json.loads(path.read_text())
    described.pop("dtype")
    for settings, own in (
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({}, "float32"),
        ({"dtype": "float16"}, "float16"),
    ):
        path.write_text(json.dumps({**described, **settings}))
        assert own_dtype(base) == own
    path.write_text("[]")
    assert "is not a model's configuration" in refusal(lambda: own_dtype(base))


def test_weights_in_parts_of_any_size_are_the_same_weights(tmp_path):
    base, draw = tiny_model(tmp_path / "base"), random.Random(3)
    wanted = load_file(base / "model.safetensors")
    for index in range(4):
        size, output = draw.choice(["5KB", "30KB", "70KB", "1GB"]), tmp_path / f"{index}"
        merge(base, output, shard_size=size)
        found: dict[str, torch.Tensor] = {}
        for file in output.glob("*.safetensors"):
            with safe_open(file, framework="pt") as part:
                assert part.metadata() == {"format": "pt"}
            found |= load_file(file)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
        assert torch.equal(logits(loaded(output, "float32")), logits(loaded(base, "float32")))
        base = output  # the next one is made from parts


class Routed(torch.nn.Module):
    """A model whose router transformers keeps in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {"router": torch.float32} if dtype != torch.float32 else {}


def test_weights_that_transformers_keeps_in_float32_stay_so():
    model = Routed()
    convert_parameters(model, "bfloat16")
    assert {name: weight.dtype for name, weight in model.named_parameters()} == {
        "router.weight": torch.float32, "router.bias": torch.float32,
        "expert.weight": torch.bfloat16, "expert.bias": torch.bfloat16,
    }  # fmt: skip


def resized_adapter(folder: Path, base: Path, rows: int, new: list[str], **settings: Any) -> torch.Tensor:
    """Save an adapter that was trained after the embeddings were resized, as peft does; return the logits with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(rows)
    model, tokenizer = loaded(base, "float32"), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(new)
    model.resize_token_embeddings(rows, mean_resizing=False)
    adapted: Any = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return known_logits(adapted)


def known_logits(model) -> torch.Tensor:
    """The logits of the last tokens that a model has."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS + model.config.vocab_size - IDS.numel(), use_cache=False).logits.float()


NEW = ["<a>", "<b>", "<c>"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 401]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_the_base_gets_as_many_embeddings_as_its_adapter_has(tmp_path, tied, settings):
    from transformers import AutoTokenizer

    base = resizable_model(tmp_path / "base", tied)
    config = parse(
        {"model": {"path": str(base), "dtype": "float32"}, "data": {"train": [{"name": "a", "path": "a.jsonl"}]}}
    )
    for rows, new in ((403, NEW), (390, [])):
        if rows < 401 and "trainable_token_indices" in settings:
            continue
        adapter, output = tmp_path / f"adapter{rows}", tmp_path / f"out{rows}"
        wanted = resized_adapter(adapter, base, rows, new, **settings)
        if rows == 403 and not tied and "embed_tokens" in settings["target_modules"]:
            # peft has saved the new rows of the embedding alone
            said = refusal(lambda adapter=adapter, output=output: merge(base, output, adapters=[adapter]))
            assert (
                "has 403 tokens and its base 400, but the adapter has no lm_head for the new ones; save it again"
                in said
            )
            continue
        merge(base, output, dtype="float32", adapters=[adapter])
        torch.testing.assert_close(known_logits(loaded(output, "float32")), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(known_logits(load_with_base(adapter, dtype=torch.float32)), wanted)
        generating = load_model(config, adapter, torch.device("cpu"))
        torch.testing.assert_close(known_logits(generating), wanted, rtol=1e-4, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(output)) == 400 + len(new)


def resizable_model(folder: Path, tied: bool) -> Path:
    """A model of 400 tokens in bfloat16."""
    model = loaded(tiny_model(folder), "bfloat16")
    if not tied:
        head = torch.nn.Linear(64, 400, bias=False, dtype=torch.bfloat16)
        model.lm_head, model.config.tie_word_embeddings = head, False
    model.save_pretrained(folder)
    return folder


def test_of_two_adapters_both_keep_the_tokens_that_they_were_trained_with(tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = resizable_model(tmp_path / "base", tied=False)
    plain, three, five = (tmp_path / name for name in ("plain", "three", "five"))
    resized_adapter(plain, base, 400, [], target_modules=["v_proj"])
    resized_adapter(three, base, 403, NEW, target_modules=["q_proj"])
    resized_adapter(five, base, 405, [*NEW, "<d>", "<e>"], target_modules=["k_proj"])
    model = loaded(base, "float32")
    model.resize_token_embeddings(403, mean_resizing=False)
    first = PeftModel.from_pretrained(model, three).merge_and_unload()
    wanted = known_logits(PeftModel.from_pretrained(first, plain))
    for order in ([three, plain], [plain, three]):
        output = tmp_path / order[0].name / "merged"
        merge(base, output, dtype="float32", adapters=order)
        torch.testing.assert_close(known_logits(loaded(output, "float32")), wanted, rtol=1e-4, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(output)) == 403
    merge(base, tmp_path / "both", dtype="float32", adapters=[three, five])
    assert loaded(tmp_path / "both", "float32").config.vocab_size == 405
    resized_adapter(tmp_path / "other", base, 403, ["<x>", "<b>", "<c>"], target_modules=["q_proj"])
    said = refusal(lambda: merge(base, tmp_path / "none", adapters=[three, tmp_path / "other"]))
    assert f"{three}: its token '<a>' has a different id from that in {tmp_path / 'other'}, or none" in said
    resized_adapter(tmp_path / "own", base, 400, [], target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    said = refusal(lambda: merge(base, tmp_path / "none", adapters=[three, tmp_path / "own"]))
    assert "own: has embeddings for 400 tokens, but an earlier adapter has them for 403" in said
