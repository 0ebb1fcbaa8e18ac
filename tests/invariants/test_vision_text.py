"""Models for text and images, trained on text alone: as a plain loop trains them, packed, however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from raysft.models.adapters import load_adapter
from raysft.models.model_parts import part_of
from raysft.models.processor import load_processor
from tests.shards import the_set, written
from tests.tiny_vision import FAMILIES, tiny_vision_model
from tests.training import (
    Case,
    Result,
    assert_same,
    make_config,
    plain_training,
    rows_of,
    train_all,
    write_conversations,
)
from tests.vision_training import assert_as_plain, is_language, weights_of

WAYS = {
    "full": {},
    "rows one by one": {"micro_batch_size": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "lora": {"finetuning": "lora"},
    "lora zero 3": {"finetuning": "lora", "zero_stage": 3},
    "freeze": {"finetuning": "freeze"},
    "freeze zero 3": {"finetuning": "freeze", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[tuple[str, str], tuple[Result, Case]]:
    """(family, way) → its training with one worker."""
    cases = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = tiny_vision_model(folder / "model", family)
        write_conversations(folder / "data.jsonl", 60)
        manifest = written(the_set(make_config(folder, model), str(model)), str(model))
        for way, options in WAYS.items():
            config = make_config(folder, model, **{"micro_batch_size": 4, "eval_at_start": False, **options})
            cases[family, way] = Case(config, rows_of(manifest), eval_rows=rows_of(manifest, steps=1))
    results = train_all(list(cases.values()))
    return {key: (result, cases[key]) for key, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_a_plain_loop_over_single_examples(trained, family):
    result, case = trained[family, "full"]
    plain = AutoModelForImageTextToText.from_pretrained(case.config.model.path)
    begun = weights_of(plain)
    language = {name for name in begun if is_language(name)}
    assert language < begun.keys()
    assert_as_plain(result, plain_training(plain, case.rows), begun, language)


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_it_is_split_changes_nothing(trained, family, way):
    result = trained[family, way][0]
    assert not result.failure
    whole = next((each for each in ("lora", "freeze") if way.startswith(each)), "full")
    assert_same(result[:4], trained[family, whole][0][:4])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_trained_one(trained, family, way):
    """It has the names of the base, of which nothing lacks, and what is trained has changed."""
    result, case = trained[family, way]
    processor = load_processor(result.model)
    assert type(processor).__name__ == type(load_processor(case.config.model.path)).__name__
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (result.model / name).read_text() == (Path(case.config.model.path) / name).read_text()
    base = load_file(Path(case.config.model.path) / "model.safetensors")
    if way.startswith("lora"):
        plain = AutoModelForImageTextToText.from_pretrained(case.config.model.path)
        adapted = load_adapter(plain, result.model)  # raises if weights lack
        names = {name for name, _ in adapted.named_parameters()}
        saved = load_file(result.model / "adapter_model.safetensors")
        assert {name.replace(".weight", ".default.weight") for name in saved} <= names
        assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
        return
    assert {name: weight.shape for name, weight in result.weights.items()} == {
        name: tuple(weight.shape) for name, weight in base.items()
    }
    both: Any = AutoModelForImageTextToText.from_pretrained(result.model, output_loading_info=True)
    loaded, info = both
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    part, begun = part_of(loaded), AutoModelForImageTextToText.from_pretrained(case.config.model.path).state_dict()
    changed = {name for name, weight in loaded.state_dict().items() if not torch.equal(weight, begun[name])}
    assert changed
    assert {part(name) for name in changed} == {"language"}
    layers = {".layers.0.", ".layers.1."}
    assert all(any(layer in name for layer in layers) for name in changed) == way.startswith("freeze")
