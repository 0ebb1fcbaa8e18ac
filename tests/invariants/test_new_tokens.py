"""Trainings with new tokens: resumed, partitioned and exported, they give the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysft.models.merging import merge
from raysft.models.new_tokens import with_new_tokens
from raysft.train.finetuning import load_trained
from tests.shards import the_set, written
from tests.tiny import tiny_model
from tests.training import (
    STEPS,
    Case,
    Result,
    assert_same,
    make_config,
    plain_model,
    plain_training,
    rows_of,
    train_all,
    write_conversations,
)

NEW = {"model.new_tokens.plain": ["capital"], "model.new_tokens.special": ["<|new|>"]}
WAYS = {
    "full": {"model.finetuning": "full"},
    "lora": {"model.finetuning": "lora"},
    "oft": {"model.finetuning": "oft"},
    "pissa": {"model.finetuning": "lora", "model.lora.pissa": True, "model.lora.pissa_iterations": 0},
    "4bit": {"model.finetuning": "lora", "model.quantization": "4bit"},
    "freeze": {"model.finetuning": "freeze", "model.freeze.layers": 1},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    base = tiny_model(folder / "base")
    write_conversations(folder / "data.jsonl", 60)
    config = make_config(folder, base, {**NEW, "data.cache": str(folder / "cache")})
    hf_config = AutoModelForCausalLM.from_pretrained(base).config
    extended = with_new_tokens(config, str(base), hf_config, print)
    rows = rows_of(written(the_set(config, extended), extended))

    def make(way: str, **settings) -> Case:
        paths = {"data.cache": str(folder / "cache"), "model.path": extended}
        return Case(make_config(folder, base, {**NEW, **WAYS[way], **paths, **settings}), rows)

    return make


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def trained(case, kept) -> dict[str, Result]:
    cases = [replace(case(way, **{"train.save_every_steps": 2}), keep=kept / way) for way in WAYS]
    return dict(zip(WAYS, train_all(cases), strict=True))


def new_ids(model: Path | str) -> list[int]:
    return AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["capital", "<|new|>"])


def test_all_weights_train_as_in_a_plain_loop_over_the_extended_model(case, trained):
    given = case("full")
    losses, _, weights = plain_training(plain_model(Path(given.config.model.path)), given.rows)
    np.testing.assert_allclose(trained["full"].losses, losses, rtol=1e-5)
    rows = trained["full"].weights["model.embed_tokens.weight"]
    np.testing.assert_allclose(rows, weights["model.embed_tokens.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "full"])
def test_the_new_rows_are_trained_and_saved(case, trained, way):
    start = load_file(Path(case(way).config.model.path) / "model.safetensors")["model.embed_tokens.weight"].numpy()
    found = {
        name: weight for name, weight in trained[way].weights.items() if "embed_tokens" in name or "lm_head" in name
    }
    assert len(found) == (1 if way == "freeze" else 2)
    for weight in found.values():
        assert (
            np.abs(weight[new_ids(case(way).config.model.path)] - start[new_ids(case(way).config.model.path)]).max()
            > 1e-3
        )


@pytest.mark.parametrize("way", list(WAYS))
def test_a_resumed_training_equals_an_uninterrupted_one(case, trained, kept, way):
    [second] = train_all([replace(case(way), resume=kept / way / "checkpoint_2")])
    assert second.losses == trained[way].losses[2:]
    for name, weight in trained[way].weights.items():
        assert np.array_equal(second.weights[name], weight), name


@pytest.mark.parametrize("stage", [2, 3])
def test_workers_and_zero_change_no_number(case, trained, stage):
    cases = [case(way, **{"train.zero_stage": stage}) for way in ("full", "lora")]
    for way, result in zip(("full", "lora"), train_all(cases, 2), strict=True):
        assert len(result.losses) == STEPS
        assert_same(result, trained[way])


@pytest.mark.parametrize("way", ["lora", "oft", "pissa"])
def test_peft_alone_and_the_export_compute_what_was_trained(case, trained, tmp_path, way):
    config, folder = case(way).config, trained[way].model
    ids = torch.tensor([[5, *new_ids(config.model.path), 9, 30]])

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids, use_cache=False).logits

    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    plain = logits(PeftModel.from_pretrained(base, folder))
    assert torch.allclose(logits(load_trained(config, folder)), plain, atol=1e-5)
    merge(folder, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(whole), plain, atol=1e-4)
    assert not torch.allclose(plain, logits(plain_model(Path(config.model.path))), atol=1e-2)
    assert new_ids(tmp_path / "out") == new_ids(config.model.path)
