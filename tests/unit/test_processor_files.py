"""A model's copies bring its processor, also the parts that cannot be loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysft.config.model import NewTokensSection
from raysft.errors import RequestError
from raysft.models.adapters import merge_adapters
from raysft.models.merging import merge
from raysft.models.new_layers import add_layers
from raysft.models.new_tokens import add_tokens
from raysft.models.processor import _without_videos, image_text, load_processor
from raysft.models.processor_files import copy_processor, save_tokenizer
from raysft.models.tokenizer import load_tokenizer
from tests.tiny import tiny_tokenizer
from tests.tiny_vision import tiny_vision_model

VIDEO = "video_preprocessor_config.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of Qwen's with a part for videos, and its template in a file of the processor's own, as first published."""
    folder = tiny_vision_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2-vl")
    (folder / VIDEO).write_text(json.dumps({"video_processor_type": "Qwen2VLVideoProcessor"}))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """An adapter that was trained elsewhere: without tokenizer or processor."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_pretrained(model)
    adapted = get_peft_model(whole, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(folder)
    return folder


def assert_same_processor(folder: Path, model: Path) -> None:
    copied, own = load_processor(folder), load_processor(model)
    assert type(copied).__name__ == type(own).__name__
    assert copied.image_processor.to_dict() == own.image_processor.to_dict()
    assert json.loads((folder / VIDEO).read_text()) == json.loads((model / VIDEO).read_text())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}]
    made = []
    for each in (copied, own):
        text = each.apply_chat_template(messages, add_generation_prompt=True)
        made.append(each(text=[text], images=[[image]], return_tensors="np"))
    assert made[0].keys() == made[1].keys()
    for name, values in made[0].items():
        np.testing.assert_array_equal(values, made[1][name])


def test_a_tokenizer_is_saved_with_its_processor(model, tmp_path):
    save_tokenizer(load_tokenizer(str(model)), tmp_path)
    assert_same_processor(tmp_path, model)


def test_copies_with_more_tokens_or_layers(model, tmp_path):
    add_layers(str(model), tmp_path / "layers", 1)
    assert_same_processor(tmp_path / "layers", model)
    add_tokens(str(model), tmp_path / "tokens", NewTokensSection(special=["<tool>"]))
    assert_same_processor(tmp_path / "tokens", model)
    assert load_processor(tmp_path / "tokens").tokenizer.convert_tokens_to_ids("<tool>") == len(
        load_tokenizer(str(model))
    )


def test_merged_models_have_the_processor_of_the_base(model, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    assert_same_processor(tmp_path / "merged", model)
    merge_adapters(str(model), [adapter], tmp_path / "start")
    assert_same_processor(tmp_path / "start", model)
    merge(model, tmp_path / "copy", dtype="bfloat16")
    assert_same_processor(tmp_path / "copy", model)


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_a_merged_model_computes_as_its_adapter_with_a_projector_trained_in_full(tmp_path, kind):
    """The projector holds several layers; peft itself unloads such a module for LoRA alone."""
    from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
    from transformers import AutoModelForImageTextToText

    folder = tiny_vision_model(tmp_path / "base", "idefics3")
    base = AutoModelForImageTextToText.from_pretrained(folder)
    shared: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["model.connector"]}
    settings = LoraConfig(r=2, **shared) if kind == "lora" else OFTConfig(r=0, oft_block_size=4, **shared)
    adapted = get_peft_model(base, settings)
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}]
    processor = load_processor(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    batch = processor(text=[processor.apply_chat_template(text)], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        untrained = plain.eval()(**batch).logits
        expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(**batch).logits
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()(**batch).logits
    assert (expected - untrained).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_processor_whose_part_for_videos_has_no_default_is_loaded_without_it(tmp_path, monkeypatch):
    from transformers import SmolVLMImageProcessorPil, SmolVLMProcessor

    module = "transformers.models.smolvlm.processing_smolvlm.num2words"
    monkeypatch.setattr(module, str)  # writes numbers of frames as words
    sizes: dict[str, Any] = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    _without_videos(SmolVLMProcessor)(
        image_processor=SmolVLMImageProcessorPil(**sizes), tokenizer=tokenizer, video_processor=None, image_seq_len=3
    ).save_pretrained(tmp_path)
    loaded = load_processor(tmp_path)
    # A view of the whole and the two tiles of an image of 56 × 28 pixels: three tokens for each.
    assert image_text(loaded, 56, 28).count("<image>") == 9
    monkeypatch.setattr(module, None)
    with pytest.raises(
        RequestError, match=r"needs a package that is not installed \(.*num2words.*; install it on every node$"
    ):
        load_processor(tmp_path)


def test_another_template_is_the_processors_too(model, tmp_path):
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = "{{ messages[0].content[0].text }}"
    save_tokenizer(tokenizer, tmp_path)
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert load_processor(tmp_path).apply_chat_template(messages) == "hello"


def test_a_processor_is_not_replaced(model, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    copy_processor(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
