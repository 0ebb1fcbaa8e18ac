"""Adapters, new layers and new tokens of models for text and images: the logits are those that they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from raysft.config import parse, with_overrides
from raysft.config.model import NewTokensSection
from raysft.errors import RequestError
from raysft.models.adapters import find_adapter
from raysft.models.merging import merge
from raysft.models.new_layers import add_layers
from raysft.models.new_tokens import add_tokens
from raysft.train.check_model import check_model
from raysft.train.finetuning import load_model
from tests.tiny_vision import FAMILIES, tiny_vision_model

IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {family: tiny_vision_model(tmp_path_factory.mktemp(family) / "model", family) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[str, Path]:
    """Adapters with the language model's layers, and the projector in full, all of them drawn at random."""
    made = {}
    for family, folder in folders.items():
        config = config_of(folder, **{"train_parts": ["language", "projector"], "lora.rank": 4})
        model = load_model(config, str(folder))
        torch.manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.normal_(std=0.2)
        made[family] = tmp_path_factory.mktemp(family) / "adapter"
        model.save_pretrained(made[family])
    return made


def config_of(folder, **settings):
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder)},
            "model": {"path": str(folder), "dtype": "float32", "attention": "sdpa"},
            "data": {"train": [{"name": "d", "path": "d.jsonl"}], "cache": str(folder.parent / "cache")},
        }
    )
    return with_overrides(config, {f"model.{key}": value for key, value in settings.items()})


def loaded(folder):
    both: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    model, info = both
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_adapter_is_the_adapter_on_its_base(folders, adapters, family, tmp_path):
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(loaded(folders[family]), str(adapters[family])).eval()
    merge(adapters[family], tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)
    assert (logits(merged) - logits(loaded(folders[family]))).abs().max() > 0.01
    whole = {name: weight for name, weight in adapted.named_parameters() if ".modules_to_save." in name}
    state = merged.state_dict()
    assert whole
    for name, weight in whole.items():
        plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        torch.testing.assert_close(state[plain], weight.detach())


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_adapters_are_continued_with_their_parts_or_merged(folders, adapters, family):
    folder, adapter = folders[family], adapters[family]
    config = config_of(folder, adapters=[str(adapter)], train_parts=["language", "projector"])
    model, place = find_adapter(config, str(folder), lambda line: None)
    assert (model, place) == (str(folder), str(adapter))
    continued = load_model(config, model, adapter=place)
    torch.testing.assert_close(logits(continued.eval()), logits(load_model(config, model, adapter=place).eval()))
    with pytest.raises(RequestError, match=r"trains \['language', 'projector'\], which cannot change") as refused:
        load_model(with_overrides(config, {"model.train_parts": ["language"]}), model, adapter=place)
    assert "\n" not in str(refused.value)
    anew = with_overrides(config, {"model.new_adapter": True, "model.train_parts": ["language"]})
    merged, none = find_adapter(anew, str(folder), lambda line: None)
    assert none is None
    torch.testing.assert_close(logits(load_model(anew, merged).eval()), logits(continued.eval()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_layers_are_the_decoders_and_change_no_logits(folders, family, tmp_path):
    add_layers(str(folders[family]), tmp_path / "more", 1)
    more, base = loaded(tmp_path / "more"), loaded(folders[family])
    assert more.config.get_text_config().num_hidden_layers == base.config.get_text_config().num_hidden_layers + 1
    torch.testing.assert_close(logits(more), logits(base), rtol=1e-4, atol=1e-4)
    config = config_of(folders[family], finetuning="freeze", new_layers=1)
    trained = {
        name for name, weight in load_model(config, str(tmp_path / "more")).named_parameters() if weight.requires_grad
    }
    assert trained
    assert all(".layers.2." in name for name in trained)
    check_model(with_overrides(config, {"data.sequence_length": 128}), str(folders[family]))


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3-vl"])
def test_new_tokens_are_the_language_models(folders, family, tmp_path):
    add_tokens(str(folders[family]), tmp_path / "more", NewTokensSection(plain=["<b>"]))
    more, base = loaded(tmp_path / "more"), loaded(folders[family])
    rows = base.get_input_embeddings().weight.shape[0]
    assert more.get_input_embeddings().weight.shape[0] > rows
    assert more.config.get_text_config().vocab_size == more.get_input_embeddings().weight.shape[0]
    torch.testing.assert_close(logits(more)[..., :rows], logits(base))


def test_an_adapter_that_peft_has_written_is_merged(folders, tmp_path):
    """peft's all-linear takes the tower too."""
    model = get_peft_model(loaded(folders["llava"]), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model.eval()), rtol=1e-4, atol=1e-4)
