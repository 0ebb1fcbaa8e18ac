"""Which class of transformers a model is loaded by, and what its parts are in families that only their configs are needed of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

from raysft.config import parse
from raysft.errors import RunFailed
from raysft.models.loading import load_weights
from raysft.models.model_class import auto_class, loaded_config, sees_images
from raysft.models.model_parts import part_of
from raysft.train.engine import check_model
from raysft.train.loss import TokenLoss
from tests.tiny import tiny_model
from tests.tiny_vision import TEXT, TOWER, tiny_gemma3


def qwen35() -> hf.Qwen3_5Config:
    """Of the models that transformers can also load as their language model alone."""
    config: Any = hf.Qwen3_5Config()
    text = {**TEXT, "vocab_size": 300, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    return hf.Qwen3_5Config(
        text_config={**config.text_config.to_dict(), **text}, vision_config={**config.vision_config.to_dict(), **tower}
    )


def test_a_model_is_loaded_whole_if_its_folder_has_a_processor(tmp_path):
    torch.manual_seed(0)
    hf.AutoModelForImageTextToText.from_config(qwen35()).save_pretrained(tmp_path)
    text = hf.AutoConfig.from_pretrained(tmp_path)
    assert auto_class(text) is hf.AutoModelForCausalLM
    assert loaded_config(text).model_type == "qwen3_5_text"
    assert not sees_images(load_weights(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    whole = hf.AutoConfig.from_pretrained(tmp_path)
    for each in (whole, copy.deepcopy(whole)):
        assert auto_class(each) is hf.AutoModelForImageTextToText
        assert loaded_config(each).model_type == "qwen3_5"
    model = load_weights(tmp_path)
    assert sees_images(model)
    part = part_of(model)
    assert {part(name) for name, _ in model.named_parameters()} == {"language", "projector", "vision"}


def test_what_has_one_class_is_loaded_by_it(tmp_path):
    assert auto_class(hf.AutoConfig.from_pretrained(tiny_model(tmp_path / "text"))) is hf.AutoModelForCausalLM
    gemma, _ = tiny_gemma3(tmp_path / "gemma")
    config = hf.AutoConfig.from_pretrained(gemma)
    assert auto_class(config) is hf.AutoModelForImageTextToText
    assert loaded_config(config) is config
    assert type(load_weights(gemma)).__name__ == "Gemma3ForConditionalGeneration"
    assert not sees_images(load_weights(tmp_path / "text"))


PARTS = {
    "aria": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "glm4v": ("model.visual", "model.visual.merger"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_next": ("model.vision_tower", "model.multi_modal_projector model.image_newline"),
    "mistral3": ("model.vision_tower", "model.multi_modal_projector"),
    "mllama": ("model.vision_model", "model.multi_modal_projector"),
    "paligemma": ("model.vision_tower", "model.multi_modal_projector"),
    "qwen3_vl_moe": ("model.visual", "model.visual.merger"),
    "smolvlm": ("model.vision_model", "model.connector"),
}
"""Family → names of its vision and of its projector; all else is its language model. As LLaMA-Factory has them."""


@pytest.mark.parametrize("family", PARTS)
def test_parts_of_other_families(family):
    config = hf.AutoConfig.for_model(family)
    for part in (config.get_text_config(), config.vision_config):
        for key in ("num_hidden_layers", "depth"):
            if hasattr(part, key):
                setattr(part, key, 2)
    with torch.device("meta"):
        model = hf.AutoModelForImageTextToText.from_config(config)
    vision, projector = (tuple(f"{name}." for name in names.split()) for names in PARTS[family])
    part = part_of(model)
    for name, _ in model.named_parameters():
        inside = f"{name}."
        expected = (
            "projector" if inside.startswith(projector) else "vision" if inside.startswith(vision) else "language"
        )
        assert part(name) == expected, name


def test_a_model_that_needs_images_is_refused_in_one_line(tmp_path):
    text = {"vocab_size": 50, "embed_dim": 16, "layers": 1, "ffn_dim": 16, "attention_heads": 2}
    tower = {**TOWER, "num_hidden_layers": 1}
    whole = hf.Kosmos2ForConditionalGeneration(hf.Kosmos2Config(text_config=text, vision_config=tower))
    config = parse(
        {
            "run": {"name": "r", "storage": str(tmp_path)},
            "model": {"path": str(tmp_path)},
            "data": {"train": [{"name": "d", "path": "d.jsonl"}]},
        }
    )
    with pytest.raises(
        RunFailed, match=r"^Kosmos2ForConditionalGeneration cannot be trained on text .*; use another"
    ) as no:
        check_model(TokenLoss(whole), config, torch.device("cpu"))
    assert "\n" not in str(no.value)
