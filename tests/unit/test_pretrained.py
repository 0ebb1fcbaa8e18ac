"""Weights that are not whole are found out, and not drawn at random."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raysft.config import RequestError, parse
from raysft.generate.engines import create_engine
from raysft.pretrained import check_weights
from raysft.train.adapters import find_adapter, merge_adapters
from raysft.train.finetuning import load_model, load_trained
from raysft.train.model import check_model
from tests.tiny import tiny_model

CONFIG = parse({"model": {"path": "m"}, "data": {"train": [{"name": "a", "path": "a"}], "sequence_length": 64}})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


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


def refusal(call) -> str:
    with pytest.raises(RequestError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_torn_file_is_named(model, adapter, tmp_path):
    folder = copied(model, tmp_path / "torn")
    check_model(CONFIG, str(folder))
    cut(folder / "model.safetensors")
    told = refusal(lambda: check_model(CONFIG, str(folder)))
    assert told.startswith(f"model.path={folder}: model.safetensors is damaged (")
    assert told.endswith("copy it again")

    folder = copied(adapter, tmp_path / "adapter")
    config = CONFIG.with_overrides({"model.finetuning": "lora", "model.lora.rank": 2, "model.adapters": [str(folder)]})
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
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    parts = sorted(tmp_path.glob(f"*.{kind}"))
    assert len(parts) > 2
    check_weights(tmp_path, "model.path=m")
    parts[1].unlink()
    told = refusal(lambda: check_weights(tmp_path, "model.path=m"))
    assert told == f"model.path=m: {parts[1].name} is missing (1 of {len(parts)} parts are); copy it again"
    index = next(tmp_path.glob("*.index.json"))
    index.write_text("{")
    assert refusal(lambda: check_weights(tmp_path, "m")) == f"m: {index.name} is damaged; copy it again"


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
        assert told.startswith(f"{folder}: lacks 9 of the model's weights (model.layers.2.")
        assert told.endswith("copy it again")
        (folder / "config.json").write_text(json.dumps({**described, "intermediate_size": 8}))
        assert f"{folder}: its weights have other shapes than its config.json says" in refusal(load_it)


def test_nor_an_adapter_without_some_of_its_weights(model, adapter, tmp_path):
    folder = copied(adapter, tmp_path / "lacking")
    file = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layers.1." not in name}, file)
    config = CONFIG.with_overrides({"model.finetuning": "lora", "model.lora.rank": 2})
    for load_it in (
        lambda: load_model(config, str(model), adapter=str(folder)),
        lambda: load_trained(config, folder),
        lambda: create_engine(config, str(folder)),
        lambda: merge_adapters(str(model), [folder], tmp_path / "out"),
    ):
        told = refusal(load_it)
        assert told.startswith(f"{folder}: lacks some of the adapter's weights (")
        assert "layers.1" in told


def test_a_model_that_does_not_continue_text_is_refused(model, tmp_path):
    for kind, told in (("t5", "encoder and decoder"), ("bart", "encoder and decoder"), ("vit", "no causal language")):
        folder = copied(model, tmp_path / kind)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert f"model_type={kind} is {told}" in refusal(lambda folder=folder: check_model(CONFIG, str(folder)))
