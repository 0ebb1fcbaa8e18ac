"""The frozen model that ASFT stays close to: what is taken, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raysft.config import parse
from raysft.models.reference_model import find_reference
from tests.messages import holds, refusal
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    tiny_model(folder / "model")
    tiny_model(folder / "other", seed=3)
    return folder


def found(folder: Path, reference: str | None, rows: int | None = 400, **model: Any) -> Any:
    config = parse(
        {
            "run": {"name": "r", "storage": str(folder / "runs")},
            "model": {"path": str(folder / "model"), **model},
            "data": {"train": [{"name": "a", "path": "a.json"}]},
            "train": {"loss": "asft", "reference_model": reference},
        }
    )
    return find_reference(config, str(folder / "model"), rows, lambda line: None)


def test_a_model_and_an_adapter_with_the_same_tokens_are_taken(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    assert found(folder, None) is None
    taken = found(folder, str(folder / "other"))
    assert (taken.model, taken.commit, taken.hf_config.hidden_size) == (str(folder / "other"), None, 64)
    whole = AutoModelForCausalLM.from_pretrained(folder / "other")
    get_peft_model(whole, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    assert found(folder, str(folder / "adapter")).model == str(folder / "adapter")


def test_a_reference_that_is_not_there_is_refused(folder):
    said = refusal(found, folder, str(folder / "none"))
    assert holds(said, f"train.reference_model={folder}/none: folder not found")


def test_another_vocabulary_is_refused(folder, tmp_path):
    shutil.copytree(folder / "other", tmp_path / "fewer")
    tokenizer = tiny_tokenizer(300)
    tokenizer.save_pretrained(tmp_path / "fewer")
    said = refusal(found, folder, str(tmp_path / "fewer"))
    assert holds(
        said,
        f"train.reference_model={tmp_path}/fewer: has a different vocabulary … is no token, but in the trained model it is token … "
        "same tokens",
    )


def test_another_number_of_embeddings_is_refused(folder):
    said = refusal(found, folder, str(folder / "other"), 448)
    assert holds(
        said,
        f"train.reference_model={folder}/other: has embeddings for 400 tokens, but model.path={folder}/model has them for "
        "448 … remove",
    )


def test_a_quantized_reference_beside_a_model_that_is_quantized_here_is_refused(folder, tmp_path):
    shutil.copytree(folder / "other", tmp_path / "quantized")
    described = json.loads((tmp_path / "quantized" / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(described))
    said = refusal(found, folder, str(tmp_path / "quantized"), quantization="4bit")
    assert holds(said, "train.reference_model … already quantized (bitsandbytes) … remove")
