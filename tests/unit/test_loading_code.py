"""The code of model cards runs as it stands."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from raysft.report.loading_code import loading_code, prompt_code
from tests.tiny import tiny_model
from tests.tiny_vision import tiny_processor, tiny_vision_model


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("images", [False, True])
def test_the_code_of_a_card_generates(tmp_path, monkeypatch, capsys, images: bool, adapter: bool):
    base = tmp_path / ("base" if adapter else "model")
    if images:
        tiny_vision_model(base, "llava")
        Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    else:
        tiny_model(base)
    if adapter:
        kind = AutoModelForImageTextToText if images else AutoModelForCausalLM
        options = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(kind.from_pretrained(base), options).save_pretrained(tmp_path / "model")
        processor = tiny_processor("llava")
        (processor if images else processor.tokenizer).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    code = loading_code("model", adapter, images) + prompt_code(True, images)
    found = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), found)
    assert found["output"].shape[1] > found["inputs"]["input_ids"].shape[1]
    assert ("pixel_values" in found["inputs"]) == images
    assert capsys.readouterr().out


def test_code_that_comes_with_a_model_is_allowed_wherever_it_loads():
    code = loading_code("org/model", adapter=False, images=True, trusted=True)
    assert code.count('"org/model", trust_remote_code=True') == code.count("org/model") == 2
