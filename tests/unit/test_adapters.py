"""Adapters that were trained before: gone on with, merged one after the other, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raysft.config import Config, parse, with_overrides
from raysft.errors import RequestError
from raysft.models.adapters import find_adapter, load_adapter
from raysft.models.merging import merge
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from tests.tiny import tiny_model

IDS = torch.arange(40)[None]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, model) -> list[str]:
    """Two adapters of random weights, each for the model as it is."""
    from peft import LoraConfig, get_peft_model

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        folder = tmp_path_factory.mktemp(f"adapter{seed}")
        get_peft_model(plain(model), settings).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def plain(path: Path | str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def config(folder: Path, model: Path, **settings) -> Config:
    return parse(
        {
            "run": {"storage": str(folder)},
            "model": {"path": str(model), "dtype": "float32", **settings},
            "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64},
        }
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def merged(model: Path, adapters: list[str]) -> torch.Tensor:
    from peft import PeftModel

    whole = plain(model)
    for adapter in adapters:
        whole = PeftModel.from_pretrained(whole, adapter).merge_and_unload()
    return logits(whole)


def test_the_last_adapter_is_gone_on_with_and_those_before_are_merged(tmp_path, model, adapters):
    settings = config(tmp_path, model, adapters=adapters)
    told: list[str] = []
    base, adapter = find_adapter(settings, str(model), told.append)
    assert adapter == adapters[1]
    torch.testing.assert_close(logits(plain(base)), merged(model, adapters[:1]))
    whole = load_model(settings, base, adapter=adapter)
    torch.testing.assert_close(logits(whole), merged(model, adapters), rtol=1e-4, atol=1e-4)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in whole.named_parameters())
    assert len(told) == 1
    assert find_adapter(settings, str(model), told.append)[0] == base
    assert len(told) == 1, "it is merged once"


def test_a_new_adapter_begins_on_all_of_them(tmp_path, model, adapters):
    settings = config(tmp_path, model, adapters=adapters, new_adapter=True)
    base, adapter = find_adapter(settings, str(model), lambda line: None)
    assert adapter is None
    torch.testing.assert_close(logits(load_model(settings, base)), merged(model, adapters))


def test_without_adapters_the_model_stays_as_it_is(tmp_path, model):
    assert find_adapter(config(tmp_path, model), str(model), print) == (str(model), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"finetuning": "oft"},
            "is lora and model.finetuning=oft would continue training it; set model.finetuning=lora",
        ),
        ({"adapters": ["nothing"]}, "model.adapters: nothing has no adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, model, adapters, settings, message):
    with pytest.raises(RequestError) as caught:
        find_adapter(config(tmp_path, model, **{"adapters": adapters, **settings}), str(model), print)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"finetuning": "freeze", "freeze": {"layers": 3}},
            "model.freeze.layers=3, but the model has 2 layers; use at most 2",
        ),
        (
            {"finetuning": "freeze", "freeze": {"modules": ["mpl"]}},
            "model.freeze.modules names 'mpl', but the model has no such module there; use one of: down_proj",
        ),
        (
            {"finetuning": "freeze", "freeze": {"extra_modules": ["mlp"]}},
            "model.freeze.extra_modules names 'mlp', but the model has no such module there; use one of: embed_tokens",
        ),
        (
            {"lora": {"extra_modules": ["nrm"]}},
            "model.lora.extra_modules names 'nrm', but the model has no such module",
        ),
        (
            {"finetuning": "oft", "oft": {"target": ["q"]}},
            "model.oft.target names 'q', but the model has no such module",
        ),
    ],
)
def test_modules_that_are_not_there_are_told_before_anything_starts(tmp_path, model, settings, message):
    with pytest.raises(RequestError) as caught:
        check_model(config(tmp_path, model, **settings), str(model))
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_8_bits_is_refused_where_its_weights_would_be_partitioned(tmp_path, model, stage):
    described = json.loads((model / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file({}, tmp_path / "model.safetensors")
    chosen = with_overrides(config(tmp_path, tmp_path), {"train.zero_stage": stage})
    if stage == 2:
        check_model(chosen, str(tmp_path))
        return
    with pytest.raises(RequestError, match=r"is quantized to 8 bits, .*train.zero_stage=3 .*set train.zero_stage=2"):
        check_model(chosen, str(tmp_path))


@pytest.mark.parametrize("part", ["decoder", "whole", "text_config"])
@pytest.mark.parametrize(
    ("method", "finetuning", "message"),
    [
        ("gptq", "full", "is quantized (gptq), which freezes its weights, but model.finetuning=full; set model.finetuning"),
        ("awq", "lora", "is quantized with awq, which needs the package gptqmodel; pip install gptqmodel on every node"),
        ("gptq", "lora", "needs the packages optimum and gptqmodel; pip install optimum gptqmodel on every node"),
        ("quanto", "lora", "needs the package optimum-quanto; pip install optimum-quanto on every node"),
        ("fbgemm_fp8", "lora", "needs the package fbgemm-gpu; pip install fbgemm-gpu on every node"),
        ("made-up", "lora", "is quantized with made-up, which this version of transformers does not support; use the model"),
        (None, "lora", "is quantized with an unnamed method, which this version of transformers does not support"),
    ],
)  # fmt: skip
def test_a_quantized_checkpoint_needs_adapters_and_its_library(tmp_path, model, method, finetuning, message, part):
    """Wherever its config says that it is quantized: of a model that also sees, the whole or its decoder's part does."""
    described = json.loads((model / "config.json").read_text())
    if part != "decoder":
        described = {"model_type": "gemma3", "text_config": {"hidden_size": 8, "max_position_embeddings": 512}}
    inner = described["text_config"] if part == "text_config" else described
    inner["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError) as caught:
        check_model(config(tmp_path, tmp_path, finetuning=finetuning), str(tmp_path))
    assert message in str(caught.value)
    if finetuning == "lora":
        with pytest.raises(
            RequestError, match=rf"--dtype float32: .* is quantized \({method or 'an unnamed method'}\)"
        ):
            merge(tmp_path, tmp_path / "out", dtype="float32")


def test_8_bit_floats_are_refused_on_a_cpu():
    from raysft.train.fp8 import check_fp8

    with pytest.raises(RequestError, match=r"train.fp8=torchao needs .* 8\.9 .*, but .* CPU; set train.fp8=off"):
        check_fp8(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_8_bit_floats_need_a_gpu_of_ada_or_later(monkeypatch, capability, fits):
    from raysft.train.fp8 import check_fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "this GPU")
    needed = "torchao, which is not installed" if fits else r"8\.9 .* but a worker has this GPU"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=needed):
        check_fp8(torch.device("cuda"))


def test_8_bit_floats_multiply_by_sides_and_not_by_what_zero_3_left_of_a_weight():
    from raysft.train.fp8 import is_convertible

    layers = {sides: torch.nn.Linear(*sides) for sides in ((16, 32), (32, 24), (8, 16))}
    for layer in layers.values():
        layer.weight.data = torch.empty(0)  # as where it is partitioned
    assert [is_convertible(layer) for layer in layers.values()] == [True, False, False]
    assert not is_convertible(torch.nn.Embedding(16, 16))


def test_adapters_of_one_form_and_other_weights_are_merged_apart(tmp_path, model, adapters):
    for adapter in adapters:
        base, _ = find_adapter(
            config(tmp_path, model, adapters=[adapter], new_adapter=True), str(model), lambda line: None
        )
        torch.testing.assert_close(logits(plain(base)), merged(model, [adapter]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 64}}, "has rank 8, which cannot change, but model.lora.rank=64"),
        ({"lora": {"dora": True}}, "has dora False, which cannot change"),
    ],
)
def test_an_adapter_that_is_gone_on_with_keeps_its_form(tmp_path, model, adapters, settings, message):
    with pytest.raises(RequestError, match=message):
        find_adapter(config(tmp_path, model, adapters=adapters, **settings), str(model), lambda line: None)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A model whose embedding is its output head too."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("tied"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_a_tied_embedding_is_refused(tmp_path, tied, target):
    with pytest.raises(RequestError, match=f"names '{target}', which the model's embedding and output head share"):
        check_model(config(tmp_path, tied, lora={"target": ["q_proj", target]}), str(tied))


def test_a_tied_weight_is_trained_by_either_name(tmp_path, tied):
    for name in ("lm_head", "embed_tokens"):
        whole = load_model(config(tmp_path, tied, finetuning="freeze", freeze={"extra_modules": [name]}), str(tied))
        assert whole.get_output_embeddings().weight.requires_grad, name
        assert not whole.model.norm.weight.requires_grad


def test_pissa_takes_no_more_than_a_matrix_has(tmp_path, tied):
    with pytest.raises(RequestError, match=r"32 × 32.*, but model\.lora\.rank=64; use at most 32"):
        check_model(config(tmp_path, tied, lora={"pissa": True, "rank": 64}), str(tied))
    check_model(config(tmp_path, tied, lora={"pissa": True, "rank": 32}), str(tied))


def test_a_model_that_is_in_place_outlives_the_draft(tmp_path):
    from raysft.train.export import put_in_place

    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "weights").write_text("new")
    (tmp_path / "model").mkdir()
    for _ in range(2):  # the second time as after a restart
        put_in_place(tmp_path / "best", tmp_path / "model")
        assert (tmp_path / "model" / "weights").read_text() == "new"


def test_an_adapter_is_read_to_where_its_model_is_and_not_to_a_gpu(model, adapters, monkeypatch):
    wanted = logits(load_adapter(plain(model), adapters[0]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # there is none, so that its use fails
    adapted = load_adapter(plain(model), adapters[0])
    assert {parameter.device.type for parameter in adapted.parameters()} == {"cpu"}
    assert torch.equal(logits(adapted), wanted)


def test_no_warning_of_how_peft_calls_transformers_reaches_the_user(tmp_path, model, adapters, recwarn):
    load_model(config(tmp_path, model, finetuning="lora"), str(model))
    load_adapter(plain(model), Path(adapters[0]))
    assert not [each for each in recwarn if "is_gradient_checkpointing" in str(each.message)]


def test_products_in_fp8_have_sides_that_gpus_take_whatever_the_number_of_tokens(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM

    from raysft.train import fp8

    products, multiply = [], torch._scaled_mm

    def multiplied(one: torch.Tensor, other: torch.Tensor, **options: Any) -> torch.Tensor:
        products.append((one.shape[1], *other.shape))
        return multiply(one, other, **options)

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path), dtype=torch.bfloat16)
    monkeypatch.setattr(fp8, "check_fp8", lambda device: None)
    monkeypatch.setattr(torch, "_scaled_mm", multiplied)
    fp8.use_fp8(model, torch.device("cpu"))
    model(input_ids=torch.arange(24)[None]).logits.sum().backward()
    assert len(products) >= 3 * 2 * 7, "of each linear layer its output, and gradients of input and weight"
    assert not [sides for sides in products if any(side % 16 for side in sides)]
