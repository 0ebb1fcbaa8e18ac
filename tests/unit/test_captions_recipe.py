"""The model and the data that ``configs/captions.py`` makes."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from PIL import Image, ImageDraw
from transformers import AutoProcessor

from tests.recipes import recipe_script


@pytest.fixture(scope="module")
def recipe():
    return recipe_script("captions")


class Plain:
    """Draws a text as it is, so that the picture can be drawn again."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height

    def generate_image(self, text: str) -> Image.Image:
        image = Image.new("RGB", self.size)
        ImageDraw.Draw(image).text((5, 5), text)
        return image


def test_each_picture_has_the_text_that_is_drawn_as_its_answer(recipe, tmp_path, monkeypatch):
    drawing = ModuleType("captcha.image")
    drawing.ImageCaptcha = Plain
    monkeypatch.setitem(sys.modules, "captcha", ModuleType("captcha"))
    monkeypatch.setitem(sys.modules, "captcha.image", drawing)
    recipe.write_pictures(tmp_path, 30)
    records = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(records) == 30
    answers = [record["messages"][1]["content"] for record in records]
    assert all(len(answer) == 2 and answer.isdigit() for answer in answers)
    assert len(set(answers)) > 5
    for record, answer in zip(records, answers, strict=True):
        picture = Image.open(tmp_path / record["messages"][0]["content"][0]["image"])
        assert picture.tobytes() == Plain(*picture.size).generate_image(answer).tobytes()


def test_the_model_takes_what_its_processor_makes_and_characters_are_tokens(recipe, tmp_path):
    from transformers import AutoModelForImageTextToText

    recipe.write_model(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    turns = [
        {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]},
        {"role": "assistant", "content": "07"},
    ]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
    patches = (recipe.SIZE // recipe.PATCH) ** 2
    assert processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]) == ["<image>"] * patches + [
        "0",
        "7",
        "<end>",
    ]
    assert processor.decode(inputs["input_ids"][0, patches:], skip_special_tokens=True) == "07"
    assert model(**inputs).logits.shape[:2] == (1, patches + 3)
