"""Weights that are not whole are found out, and not drawn at random."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import raysft
from raysft.config import parse, with_overrides
from raysft.data.tokenization.tokenizer import Tokenizer
from raysft.errors import RequestError
from raysft.generate.engines import create_engine
from raysft.models.adapters import find_adapter, merge_adapters
from raysft.models.merging import merge
from raysft.models.tokenizer import load_tokenizer
from raysft.models.weight_files import check_weights, embedding_rows
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model, load_trained
from tests.messages import refusal
from tests.tiny import tiny_tokenizer

CONFIG = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64}})


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    return folder


def copied(folder: Path, into: Path) -> Path:
    shutil.copytree(folder, into)
    return into


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def test_a_torn_file_is_named(model, adapter, tmp_path):
    folder = copied(model, tmp_path / "torn")
    check_model(CONFIG, str(folder))
    cut(folder / "model.safetensors")
    told = refusal(lambda: check_model(CONFIG, str(folder)))
    assert told.startswith(f"model.path={folder}: model.safetensors is damaged (")
    assert told.endswith("copy it again")

    folder = copied(adapter, tmp_path / "adapter")
    config = with_overrides(CONFIG, {"model.finetuning": "lora", "model.lora.rank": 2, "model.adapters": [str(folder)]})
    assert find_adapter(config, str(model), print) == (str(model), str(folder))
    cut(folder / "adapter_model.safetensors")
    told = refusal(lambda: find_adapter(config, str(model), print))
    assert told.startswith(f"model.adapters: {folder}: adapter_model.safetensors is damaged (")


@pytest.mark.parametrize("safe", [True, False])
def test_a_missing_part_is_named(model, tmp_path, safe):
    if safe:
        AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="60KB")
        kind = "safetensors"
    else:
        weights, kind = load_file(model / "model.safetensors"), "bin"
        parts = {name: f"pytorch_model-{index % 3}.bin" for index, name in enumerate(weights)}
        for part in set(parts.values()):
            torch.save({name: weights[name] for name, file in parts.items() if file == part}, tmp_path / part)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    parts = sorted(tmp_path.glob(f"*.{kind}"))
    assert len(parts) > 2
    check_weights(tmp_path, "model.path=m")
    parts[1].unlink()
    told = refusal(lambda: check_weights(tmp_path, "model.path=m"))
    assert told == f"model.path=m: {parts[1].name} is missing (1 of {len(parts)} parts are); copy it again"
    index = next(tmp_path.glob("*.index.json"))
    for torn in (
        "{",
        "[]",
        '{"weight_map": {}, "metadata": {}}',
        '{"weight_map": {"a": 1}, "metadata": {}}',
        '{"weight_map": {}}',
    ):
        index.write_text(torn)
        assert refusal(lambda: check_weights(tmp_path, "m")) == f"m: {index.name} is damaged; copy it again"


def test_files_that_nobody_loads_do_not_count(model, tmp_path):
    folder = copied(model, tmp_path / "stale")
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "model-1-of-2.safetensors"}}'
    )
    (folder / "consolidated.safetensors").write_bytes(b"torn")
    check_weights(folder, "m")
    load_model(CONFIG, str(folder))
    (folder / "model.safetensors").unlink()
    assert "model-1-of-2.safetensors is missing" in refusal(lambda: check_weights(folder, "m"))
    (folder / "model.safetensors.index.json").unlink()
    assert "contains no weights" in refusal(lambda: check_weights(folder, "m"))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_end_of_a_tied_embedding_is_merged_into_that_end_alone(model, tmp_path, target):
    base = AutoModelForCausalLM.from_pretrained(model)
    assert base.config.tie_word_embeddings
    torch.manual_seed(1)
    settings = LoraConfig(r=4, target_modules=[target, "q_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = adapted(ids, use_cache=False).logits
        asked = adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    merge(tmp_path / "adapter", tmp_path / "out")
    merge_adapters(str(model), [tmp_path / "adapter"], tmp_path / "cached")
    for folder in ("out", "cached"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        with torch.inference_mode():
            torch.testing.assert_close(merged(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    config = with_overrides(CONFIG, {"generate.max_new_tokens": 12, "generate.do_sample": False})
    [written] = create_engine(config, str(tmp_path / "adapter")).complete(["a"], [ids[0].tolist()])
    assert written.text == tiny_tokenizer().decode(asked[0, 20:], skip_special_tokens=True)


def test_a_prompt_learnt_before_the_model_is_not_merged(model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    learnt = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    learnt.save_pretrained(tmp_path)
    ids = torch.arange(5, 15)[None]
    asked = learnt.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    config = with_overrides(CONFIG, {"generate.max_new_tokens": 6, "generate.do_sample": False})
    [written] = create_engine(config, str(tmp_path)).complete(["a"], [ids[0].tolist()])
    assert written.text == tiny_tokenizer().decode(asked[0, 10:], skip_special_tokens=True)


def test_an_adapter_that_does_not_fit_is_one_line(model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])).save_pretrained(tmp_path)
    file, description = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    weights, described = load_file(file), json.loads(description.read_text())
    save_file({name: value for name, value in weights.items() if "norm" not in name}, file)
    assert "is not an adapter of this model (KeyError: " in refusal(lambda: create_engine(CONFIG, str(tmp_path)))
    save_file(weights, file)
    for changed in ({"r": 3}, {"r": 0}, {"target_modules": ["none"]}, {"peft_type": "NONE"}):
        description.write_text(json.dumps({**described, **changed}))
        assert "is not an adapter of this model (" in refusal(lambda: create_engine(CONFIG, str(tmp_path)))


def test_no_way_in_which_a_model_is_loaded_draws_weights_at_random(model, tmp_path):
    folder = copied(model, tmp_path / "lacking")
    described = json.loads((model / "config.json").read_text())
    for load_it in (
        lambda: load_model(CONFIG, str(folder)),
        lambda: load_trained(CONFIG, folder),
        lambda: create_engine(CONFIG, str(folder)),
        lambda: merge_adapters(str(folder), [], tmp_path / "out"),
    ):
        (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 3}))
        told = refusal(load_it)
        assert told.startswith(f"{folder}: is missing 9 of the model's weights (model.layers.2.")
        assert told.endswith("copy it again")
        (folder / "config.json").write_text(json.dumps({**described, "intermediate_size": 8}))
        assert f"{folder}: its weights have different shapes from those in its config.json" in refusal(load_it)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_nor_where_they_are_quantized_on_the_way(model, tmp_path, bits):
    folder = copied(model, tmp_path / "lacking")
    described = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 3}))
    config = with_overrides(CONFIG, {"model.finetuning": "lora", "model.quantization": bits})
    for load_it in (lambda: load_model(config, str(folder)), lambda: create_engine(config, str(folder))):
        assert f"{folder}: is missing 9 of the model's weights" in refusal(load_it)


def test_nor_an_adapter_without_some_of_its_weights(model, adapter, tmp_path):
    folder = copied(adapter, tmp_path / "lacking")
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.1." not in name}, file)
    config = with_overrides(CONFIG, {"model.finetuning": "lora", "model.lora.rank": 2})
    for load_it in (
        lambda: load_model(config, str(model), adapter=str(folder)),
        lambda: load_trained(config, folder),
        lambda: create_engine(config, str(folder)),
        lambda: merge_adapters(str(model), [folder], tmp_path / "out"),
    ):
        told = refusal(load_it)
        assert told.startswith(f"{folder}: is missing some of the adapter's weights (")
        assert "layers.1" in told


def test_a_model_that_does_not_continue_text_is_refused(model, tmp_path):
    for kind, told in (("t5", "an encoder-decoder"), ("bart", "an encoder-decoder"), ("vit", "not a causal language")):
        folder = copied(model, tmp_path / kind)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert f"model_type={kind} is {told}" in refusal(lambda folder=folder: check_model(CONFIG, str(folder)))


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_the_embeddings_of_a_model_are_counted_in_its_weights(model, tmp_path, shard_size):
    larger = AutoModelForCausalLM.from_pretrained(model)
    larger.resize_token_embeddings(448)
    folder = tmp_path / "larger"
    larger.save_pretrained(folder, max_shard_size=shard_size)
    description = AutoConfig.from_pretrained(folder)
    assert embedding_rows(folder, description, "m") == 448
    description.vocab_size = 400
    told = refusal(lambda: embedding_rows(folder, description, "m"))
    assert told.startswith("m: config.json has vocab_size=400, but its weights hold 448 embeddings; ")


def test_nothing_is_said_of_embeddings_that_only_the_own_code_of_a_model_knows(model):
    class Own(LlamaConfig):
        model_type = "own"

    assert embedding_rows(model, Own(vocab_size=300), "m") == 400
    assert embedding_rows(model / "on-the-hub", AutoConfig.from_pretrained(model), "m") == 400


def test_a_tokenizer_that_only_other_libraries_read_is_one_line(tmp_path, capfd):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    with pytest.raises(RequestError, match=r"its tokenizer cannot be loaded \(.*tokenizer\.json") as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def of_run(model, adapter, output):
    Tokenizer.load(str(model))


def of_export(model, adapter, output):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, adapter / name)
    merge(adapter, output)


def of_merged_adapters(model, adapter, output):
    merge_adapters(str(model), [adapter], output)


@pytest.mark.parametrize("load", [of_run, of_export, of_merged_adapters])
def test_a_damaged_tokenizer_is_one_line_with_a_remedy(model, adapter, tmp_path, load):
    model, adapter = copied(model, tmp_path / "model"), copied(adapter, tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(model)
    cut(model / "tokenizer.json")
    said = refusal(lambda: load(model, adapter, tmp_path / "output"))
    assert "its tokenizer cannot be loaded (" in said
    assert said.endswith("put its files (tokenizer.json, …) into the folder")


def test_one_function_loads_every_tokenizer():
    package = Path(raysft.__file__).parent
    users = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"AutoTokenizer\.from_pretrained\((?!\"model\")", path.read_text(encoding="utf-8"))
    }
    # remote_code.py only asks whether transformers knows the tokenizer without the model's own code.
    assert users == {"models/tokenizer.py", "models/remote_code.py"}
