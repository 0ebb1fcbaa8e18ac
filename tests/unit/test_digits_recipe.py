"""The model and the data that ``configs/digits.py`` makes, from a small language model and a few digits."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from tests.recipes import recipe_script
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def recipe():
    return recipe_script("digits")


def test_each_digit_is_a_picture_with_its_own_answer(recipe, tmp_path, monkeypatch):
    table = np.random.default_rng(0).integers(0, 17, (5, 65))
    table[:, 64] = [3, 1, 4, 1, 5]
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as stream:
        np.savetxt(stream, table, fmt="%d", delimiter=",")
    monkeypatch.setattr(recipe, "packaged", lambda package: tmp_path / "digits.csv.gz")
    assert recipe.write_digits(tmp_path) == 5
    records = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert [record["messages"][1]["content"] for record in records] == ["3", "1", "4", "1", "5"]
    for record, pixels in zip(records, table[:, :64], strict=True):
        picture = Image.open(tmp_path / record["messages"][0]["content"][0]["image"])
        assert (np.asarray(picture).reshape(-1) // 15 == pixels).all()


def test_the_language_model_is_the_given_one(recipe, tmp_path):
    language = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path))
    model = recipe.llava(language, 3)
    ids = torch.arange(4, 12)[None]
    np.testing.assert_array_equal(model(input_ids=ids).logits.detach(), language(input_ids=ids).logits.detach())
    image = torch.tensor([[4, *[3] * 4, 5]])
    assert model(input_ids=image, pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape[:2] == (1, 6)
