"""Tokens that a base model was never trained on, and the warning if a run would not train them either."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from raysft.cluster.placement import Node
from raysft.config import with_overrides
from raysft.data.prepare import prepare
from raysft.models.untrained_tokens import untrained_tokens
from raysft.run.inputs import ModelFiles, untrained_ends
from raysft.run.plan import make_plan
from tests.shards import data_config, write_records
from tests.tiny import tiny_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tiny_model(tmp_path / "model")
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    (folder / "model.safetensors").unlink()  # transformers would load it instead of the parts
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def change(model: Path, name: str, row: int, like: int | None) -> None:
    """Set a row to almost zero, or to another row."""
    for file in model.glob("*.safetensors"):
        weights = load_file(file)
        if name in weights:
            weights[name][row] = weights[name][row] * 1e-6 if like is None else weights[name][like]
            save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize("like", [None, 1])
def test_rows_of_almost_zero_and_twins_were_never_trained(model, name, like):
    special = AutoTokenizer.from_pretrained(model).all_special_ids
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    assert untrained_tokens(str(model), [end, 5], special) == []
    change(model, name, end, like)
    assert untrained_tokens(str(model), [5, end], special) == [end]
    assert untrained_tokens("no/such-model-here", [end], special) == []


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, True),
        ({"model.finetuning": "freeze"}, True),
        ({"model.finetuning": "full"}, False),
        ({"model.lora.extra_modules": ["embed_tokens", "lm_head"]}, False),
        ({"model.new_tokens.special": ["<|im_end|>"]}, False),
    ],
)
def test_a_run_that_leaves_the_token_untrained_is_warned(model, tmp_path, settings, warned):
    change(model, EMBEDDING, AutoTokenizer.from_pretrained(model).eos_token_id, None)
    write_records(tmp_path / "a.jsonl", [["Hi.", f"Yo {index}."] for index in range(40)])
    config = with_overrides(data_config(tmp_path, sequence_length=64), {"model.path": str(model), **settings})
    prepared = prepare(config, str(model))
    found = untrained_ends(config, ModelFiles(str(model), None, None), prepared)
    assert found == (("<|im_end|>",) if warned else ())
    told = [line for line in make_plan(config, prepared, [Node(2.0)], None, found).warnings if "<|im_end|>" in line]
    assert len(told) == warned
    assert all("; add it to model.new_tokens.special" in line for line in told)
