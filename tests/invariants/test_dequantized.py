"""Checkpoints in FP8 and MXFP4 train as the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raysft.cli import main
from raysft.config import with_overrides
from raysft.errors import RequestError
from raysft.models.dequantized import dequantize, exact_copy
from raysft.models.loading import load_weights
from raysft.models.merging import merge
from raysft.models.quantized_weights import from_mxfp4
from raysft.run.inputs import check_model_files, find_other_model
from raysft.storage.model_cache import boot
from raysft.storage.path import StoragePath
from raysft.train.finetuning import load_frozen, load_trained
from tests.messages import holds, refusal
from tests.quantized import to_fp8, to_mxfp4
from tests.shards import the_set, written
from tests.tiny import FAMILIES, tiny_mixture
from tests.training import Case, assert_same, make_config, rows_of, train_all, write_conversations

KINDS: dict[str, tuple[str, dict[str, Any], Callable[[Path, Path], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "fp8": ("deepseek_v3", {}, to_fp8, {"finetuning": "lora"}),
    "mxfp4": ("gpt_oss", {"intermediate_size": 64}, to_mxfp4, {"finetuning": "full"}),
}
"""Method → family, settings, how it is quantized, and what of it is trained."""


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, tmp_path_factory) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """(method, folder with ``quantized`` and ``plain``, what the quantized weights stand for)."""
    folder = tmp_path_factory.mktemp(request.param)
    family, settings, quantize, _ = KINDS[request.param]
    tiny_mixture(folder / "plain", family, **{**FAMILIES[family], **settings})
    exact = quantize(folder / "plain", folder / "quantized")
    save_file(exact, folder / "plain/model.safetensors", {"format": "pt"})
    write_conversations(folder / "data.jsonl", 60)
    return request.param, folder, exact


def config(quantized, name: str = "quantized", **train: Any):
    method, folder, _ = quantized
    return make_config(folder, folder / name, {"train.max_steps": 2}, **{**KINDS[method][3], **train})


def test_a_copy_holds_what_the_numbers_stand_for(quantized):
    method, folder, exact = quantized
    told: list[str] = []
    files = check_model_files(config(quantized), told.append)
    assert any(f"{method.upper()} are dequantized" in line for line in told)
    copy = Path(files.model)
    assert "quantization_config" not in json.loads((copy / "config.json").read_text())
    found = load_file(copy / "model.safetensors")
    assert found.keys() == exact.keys()
    for name, weight in exact.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)
    whole = load_weights(copy, dtype=torch.float32).eval()
    plain = load_weights(folder / "plain", dtype=torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(whole(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert check_model_files(config(quantized), told.append).model == files.model, "it is made once"
    assert len(told) == 1


def test_it_is_trained_and_exported_as_a_plain_model(quantized, tmp_path):
    method, folder, exact = quantized
    copy = check_model_files(config(quantized), lambda line: None).model
    rows = rows_of(written(the_set(config(quantized, "plain"), copy), copy), steps=2)
    cases = [
        Case(
            make_config(folder / place, Path(model), {"train.max_steps": 2}, **KINDS[method][3], zero_stage=stage), rows
        )
        for place, model, stage in (("a", folder / "plain", 0), ("b", copy, 3))
    ]
    (one,), (two,) = train_all(cases[:1]), train_all(cases[1:], world=2)
    assert not one.failure
    assert_same(one[:4], two[:4])
    output = tmp_path / "exported"
    merge(two.model, output)
    described = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in described
    trained = load_file(output / "model.safetensors")
    assert trained.keys() >= exact.keys()
    assert all(weight.dtype in (torch.float32, torch.bfloat16) for weight in trained.values())
    assert any((trained[name].float() - exact[name].float()).abs().max() > 1e-3 for name in exact)


@pytest.fixture
def adapter(quantized, tmp_path) -> Path:
    """An adapter with numbers, on the quantized model."""
    _, folder, _ = quantized
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    adapted = get_peft_model(plain, LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "quantized")
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 30)[None]).logits


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_models_beside_the_trained_one_are_dequantized_too(quantized, adapter, what):
    _, folder, _ = quantized
    given = folder / "quantized" if what == "model" else adapter
    expected = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    if what == "adapter":
        expected = PeftModel.from_pretrained(expected, adapter)
    told: list[str] = []
    for key in ("evaluate.model", "generate.model"):
        asked = with_overrides(config(quantized, "plain"), {key: str(given)})
        found = find_other_model(asked, str(given), key, told.append)
        assert found.method is None
        torch.testing.assert_close(logits(load_trained(asked, found.location)), logits(expected), rtol=1e-5, atol=1e-5)
    asked = config(quantized, "plain", loss="asft", reference_model=str(given))
    reference = check_model_files(asked, told.append).reference
    assert reference is not None
    torch.testing.assert_close(logits(load_frozen(asked, reference.model)), logits(expected), rtol=1e-5, atol=1e-5)
    assert len(told) <= 1, "it is made once"
    for_vllm = with_overrides(config(quantized, "plain"), {"generate.engine": "vllm", "generate.model": str(given)})
    assert find_other_model(for_vllm, str(given), "generate.model", print).location == str(given)


def test_export_merges_into_what_the_numbers_stand_for(quantized, adapter, tmp_path, monkeypatch):
    _, folder, _ = quantized
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(plain, adapter))
    for number, (source, *more) in enumerate([(adapter,), (folder / "quantized", "--adapters", str(adapter))]):
        output = tmp_path / str(number)
        assert main(["export", str(source), "--output", str(output), "--dtype", "float32", *more]) == 0
        exported = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
    assert main(["export", str(folder / "quantized"), "--output", str(tmp_path / "wide"), "--dtype", "bfloat16"]) == 0
    wide, exact = (load_file(each / "model.safetensors") for each in (tmp_path / "wide", folder / "plain"))
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in wide.items())
    assert main(["export", str(folder / "quantized"), "--output", str(tmp_path / "same")]) == 0
    as_it_was = (folder / "quantized/model.safetensors").read_bytes()
    assert (tmp_path / "same/model.safetensors").read_bytes() == as_it_was


def test_code_that_is_not_trusted_is_not_in_the_copy(quantized, tmp_path):
    """An adapter names any model as its base: its code must not come to be that of a model that is trusted."""
    _, folder, _ = quantized
    model = tmp_path / "model"
    shutil.copytree(folder / "quantized", model)
    (model / "modeling_own.py").write_text("raise SystemExit")
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"auto_map": {"AutoConfig": "modeling_own.Own"}}))
    for trusted, there in (([], False), ([str(model)], True)):
        copy = Path(exact_copy(StoragePath.of(tmp_path), str(model), print, bool(trusted)))
        assert (copy / "modeling_own.py").exists() == there
        assert ("auto_map" in json.loads((copy / "config.json").read_text())) == there


def test_a_copy_that_has_no_room_is_refused(quantized, tmp_path, monkeypatch):
    _, folder, _ = quantized
    free = SimpleNamespace(free=1000)
    monkeypatch.setattr("raysft.models.dequantized.shutil.disk_usage", lambda place: free)
    with pytest.raises(
        RequestError, match=r"its weights take 0.0 GiB in 16 bits, but .* free; free some space"
    ) as caught:
        exact_copy(StoragePath.of(tmp_path), str(folder / "quantized"), print)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "models").glob("*dequantized-*/*"))


def test_weights_without_their_scales_are_refused(quantized, tmp_path):
    method, folder, _ = quantized
    weights = load_file(folder / "quantized/model.safetensors")
    name, scale = {
        "fp8": ("o_proj.weight", "o_proj.weight_scale_inv"), "mxfp4": ("down_proj_blocks", "down_proj_scales")
    }[method]  # fmt: skip
    scale = next(each for each in weights if each.endswith(scale))
    changes: list[tuple[torch.Tensor | None, str]] = [(None, "is missing")]
    changes += [(torch.ones(1, 1), "weight_block_size")] if method == "fp8" else []
    for number, (other, told) in enumerate(changes):
        damaged = tmp_path / str(number)
        damaged.mkdir()
        (damaged / "config.json").write_text((folder / "quantized/config.json").read_text())
        content = {each: weight for each, weight in weights.items() if each != scale}
        save_file(content | ({} if other is None else {scale: other}), damaged / "model.safetensors")
        with pytest.raises(RequestError, match=told) as caught:
            dequantize(damaged, tmp_path / f"to-{number}")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_scales_without_their_weights_are_refused(quantized, tmp_path):
    method, folder, _ = quantized
    weights = load_file(folder / "quantized/model.safetensors")
    end = {"fp8": "o_proj.weight", "mxfp4": "down_proj_blocks"}[method]
    gone = next(name for name in weights if name.endswith(end))
    (tmp_path / "config.json").write_text((folder / "quantized/config.json").read_text())
    save_file({name: each for name, each in weights.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=rf"_scale\w+ is the scale of {gone}, which is missing") as caught:
        dequantize(tmp_path, tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_a_copy_has_what_is_trained_in_the_type_of_the_language_model(tmp_path):
    """Scales of activations and of caches are left out, whatever has them."""
    description = {"quantization_config": {"quant_method": "fp8"}, "text_config": {"dtype": "float16"}}
    (tmp_path / "config.json").write_text(json.dumps(description))
    weight, scale = torch.ones(2, 2).to(torch.float8_e4m3fn), torch.tensor([2.0])
    unused = (
        "experts.gate_up_proj_activation_scale", "a.activation_scale", "a.input_scale", "attn.k_scale", "attn.v_scale",
    )  # fmt: skip
    content = {"a.weight": weight, "a.weight_scale": scale, "logit_scale": scale, **dict.fromkeys(unused, scale)}
    save_file({name: each.clone() for name, each in content.items()}, tmp_path / "model.safetensors")
    dequantize(tmp_path, tmp_path / "copy")
    found = load_file(tmp_path / "copy/model.safetensors")
    assert found.keys() == {"a.weight", "logit_scale"}
    assert torch.equal(found["a.weight"], torch.full((2, 2), 2.0, dtype=torch.float16))


def test_weights_that_stay_quantized_cannot_be_trained_in_full(quantized):
    with pytest.raises(RequestError, match=r"is quantized \(.*set model.finetuning to lora or oft"):
        check_model_files(with_overrides(config(quantized, finetuning="full"), {"model.dequantize": False}), print)
    method, folder, _ = quantized
    if method == "mxfp4":  # which transformers dequantizes itself on a CPU
        return
    as_it_is = with_overrides(config(quantized, finetuning="lora"), {"model.dequantize": False})
    expected = "quantized: is stored in FP8, which CPUs have no kernels for … model.dequantize=false; remove"
    assert holds(refusal(check_model_files, as_it_is, print), f"model.path= … {expected}")
    given = str(folder / "quantized")
    assert holds(refusal(find_other_model, as_it_is, given, "evaluate.model", print), f"evaluate.model= … {expected}")


def test_numbers_are_read_as_transformers_reads_them(tmp_path):
    """FP8 where it can read them: of blocks that divide all matrices."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(1)
    blocks, scales = (
        torch.randint(*span, size, dtype=torch.uint8, generator=draw)
        for span, size in (((0, 256), (3, 8, 2, 16)), ((110, 140), (3, 8, 2)))
    )
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    torch.testing.assert_close(from_mxfp4(blocks, scales, torch.bfloat16), theirs, rtol=0, atol=0)
    tiny_mixture(tmp_path / "plain", "qwen3_moe", **FAMILIES["qwen3_moe"])
    to_fp8(tmp_path / "plain", tmp_path / "fp8", block=(8, 16))
    dequantize(tmp_path / "fp8", tmp_path / "copy")
    method = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 16))
    other = load_weights(tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=method).state_dict()
    for name, weight in load_weights(tmp_path / "copy", dtype=torch.bfloat16).state_dict().items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("scale", "method", "told"),
    [
        (torch.ones(64), {"weight_block_size": [12, 20]}, "a scale is one number or one for each block"),
        (torch.ones(6, 4), {}, "add weight_block_size"),
        (torch.ones(1), {}, ""),
        (torch.ones(8, 4), {}, ""),
    ],
)
def test_scales_are_read_in_one_way_or_refused(tmp_path, scale, method, told):
    """Of rows of 64 numbers in 6 blocks the config must say how large a block is; 8 blocks are of 8 each."""
    torch.manual_seed(0)
    weight, scale = torch.randn(64, 64).to(torch.float8_e4m3fn), scale * torch.rand(scale.shape)
    (tmp_path / "from").mkdir()
    described = {"quantization_config": {"quant_method": "fp8", **method}}
    (tmp_path / "from/config.json").write_text(json.dumps(described))
    save_file({"a.weight": weight, "a.weight_scale": scale}, tmp_path / "from/model.safetensors")
    if told:
        with pytest.raises(RequestError, match=told) as caught:
            dequantize(tmp_path / "from", tmp_path / "to")
        assert "\n" not in str(caught.value)
        return
    dequantize(tmp_path / "from", tmp_path / "to")
    meant = weight.float() * torch.kron(
        scale.reshape(-1, scale.shape[-1]), torch.ones(64 // len(scale), 64 // scale.shape[-1])
    )
    torch.testing.assert_close(
        load_file(tmp_path / "to/model.safetensors")["a.weight"], meant.bfloat16(), rtol=0, atol=0
    )


FP8, BLOCKS = torch.ones(4, 32).to(torch.float8_e4m3fn), torch.ones(2, 4, 1, 16, dtype=torch.uint8)
EXPONENTS, NAN = torch.full((2, 4, 1), 127, dtype=torch.uint8), float("nan")


@pytest.mark.parametrize(
    ("weights", "block", "told"),
    [
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2)}, 16, "config.json: weight_block_size=16 is not"),
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2)}, [0, 16], "the two sides of a block"),
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2), "a_scale": torch.ones(1)}, None, "a has two scales"),
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2).int()}, None, "a_scale_inv is stored in I32, but scales are in F64"),
        ({"a": FP8, "a_scale_inv": torch.tensor([[1.0, NAN]])}, None, "a_scale_inv holds scales that are no numbers"),
        ({"a": FP8[0], "a_scale_inv": torch.ones(2)}, [2, 16], "a scale is one number or one"),
        ({"a": FP8.to(torch.float8_e4m3fnuz), "a_scale_inv": torch.ones(2, 2)}, None, "a is stored in F8_E4M3FNUZ"),
        ({"a": FP8.to(torch.int8), "a_scale": torch.ones(4, 1)}, None, "a is stored in I8, which is not dequantized here"),
        ({"a_blocks": BLOCKS, "a_scales": EXPONENTS[:1]}, None, "a_scales has the shape [1, 4, 1] in U8 … need [2, 4, 1]"),
        ({"a_blocks": BLOCKS.repeat(1, 1, 2, 1), "a_scales": EXPONENTS}, None, "a_scales … need [2, 4, 2] in U8"),
        ({"a_blocks": BLOCKS, "a_scales": EXPONENTS.float()}, None, "a_scales has the shape [2, 4, 1] in F32"),
        ({"a_blocks": BLOCKS[..., :8], "a_scales": EXPONENTS}, None, "a_blocks has the shape [2, 4, 1, 8]"),
        ({"a_blocks": BLOCKS, "a_scales": EXPONENTS + 128}, None, "a_scales holds scales that are no numbers"),
        ({"a_blocks": BLOCKS, "a_scales": EXPONENTS, "a": torch.ones(2, 32, 4)}, None, "holds a twice"),
    ],
)  # fmt: skip
def test_what_would_be_read_wrongly_is_refused(tmp_path, weights, block, told):
    model = quantized_folder(tmp_path / "model", weights, {"quant_method": "fp8", "weight_block_size": block})
    assert holds(refusal(exact_copy, StoragePath.of(tmp_path), str(model), print), f"{model} … {told}")
    assert not list((tmp_path / "models").glob("dequantized-*"))


@pytest.mark.parametrize(
    ("weights", "method", "told"),
    [
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2)}, None, "a is quantized (F8_E4M3, with a_scale_inv), but … copy"),
        ({"a_blocks": BLOCKS, "a_scales": EXPONENTS}, None, "a_blocks is quantized (U8, with a_scales), but … copy"),
        ({"a": FP8, "a_scale_inv": torch.ones(2, 2)}, [], "is not a model's configuration … copy"),
    ],
)
def test_weights_that_are_not_said_to_be_quantized_are_refused(tmp_path, weights, method, told):
    model = quantized_folder(tmp_path / "model", weights, method)
    assert holds(refusal(exact_copy, StoragePath.of(tmp_path), str(model), print), f"{model} … {told}")


def quantized_folder(model: Path, weights: dict[str, torch.Tensor], method: Any) -> Path:
    """Save weights with a config that says how they are quantized."""
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"quantization_config": method}))
    save_file({name: each.contiguous() for name, each in weights.items()}, model / "model.safetensors")
    return model


def test_a_damaged_file_is_told(quantized, tmp_path):
    _, folder, _ = quantized
    shutil.copytree(folder / "quantized", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    told = refusal(exact_copy, StoragePath.of(tmp_path), str(tmp_path / "model"), print)
    assert holds(told, f"{tmp_path}/model: model.safetensors is damaged … copy it again")


def test_a_copy_is_made_anew_where_the_model_has_other_files(quantized, tmp_path):
    """Its tokenizer is that of the model; what a killed process has left of it is removed."""
    _, folder, _ = quantized
    model, cache = tmp_path / "model", StoragePath.of(tmp_path / "cache")
    shutil.copytree(folder / "quantized", model)
    first = Path(exact_copy(cache, str(model), print))
    shutil.rmtree(first)
    left = first.with_name(f".{first.name}.{boot()}-0123")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert exact_copy(cache, str(model), print) == str(first)
    assert not left.exists()
    (model / "chat_template.jinja").write_text("another one")
    second = Path(exact_copy(cache, str(model), print))
    assert second != first
    assert (second / "chat_template.jinja").read_text() == "another one"
