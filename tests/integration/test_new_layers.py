"""A run whose model gets new layers, through the command line: every stage sees the same expanded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raysft.cli import main
from raysft.storage.json_files import read_jsonl
from tests.tiny import tiny_folder

pytestmark = pytest.mark.usefixtures("local_ray")
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: freeze}}
data:
  train: [{{name: chat, path: {folder}/chat.jsonl}}]
  holdout: 0.2
  sequence_length: 128
  cache: {folder}/cache
train: {{max_steps: 4, global_batch_size: 4, learning_rate: 1.0e-2, zero_stage: 2, save_every_steps: 3}}
scaling: {{num_workers: 2, cpus_per_worker: 0.75, threads_per_worker: 1}}
generate: {{max_examples: 4, max_new_tokens: 8, do_sample: false, batch_size: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    return tiny_folder(folder, CONFIG.format(folder=folder), chat=40)


def run(folder: Path, verb: str, name: str, *arguments: str) -> Path:
    assert main([verb, str(folder / "c.yaml"), f"run.name={name}", *arguments]) == 0
    return folder / "runs" / name


def first_evaluation(run: Path) -> dict[str, Any]:
    return next(record for record in read_jsonl(run / "trainer_log.jsonl") if record.get("current_steps") == 0)


@pytest.fixture(scope="module")
def plain(folder) -> Path:
    return run(folder, "run", "plain", "train.max_steps=1")


@pytest.fixture(scope="module")
def expanded(folder) -> Path:
    assert main(["check", str(folder / "c.yaml"), "model.new_layers=1"]) == 0
    return run(folder, "run", "expanded", "model.new_layers=1")


def test_before_the_first_step_it_evaluates_and_predicts_as_the_model_does(plain, expanded):
    before, after = first_evaluation(plain), first_evaluation(expanded)
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    rows = [list(read_jsonl(run / "generated_predictions_base.jsonl")) for run in (plain, expanded)]
    assert [row["predict"] for row in rows[0]] == [row["predict"] for row in rows[1]]


def test_only_the_new_layer_is_trained_and_the_model_loads_with_transformers(folder, expanded):
    trained = AutoModelForCausalLM.from_pretrained(expanded / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert (trained.config.num_hidden_layers, base.config.num_hidden_layers) == (3, 2)
    weights = trained.state_dict()
    for name, weight in base.state_dict().items():
        assert torch.equal(weights[name], weight), name
    new = {name: weight for name, weight in weights.items() if name.startswith("model.layers.2.")}
    assert new.keys() == weights.keys() - base.state_dict().keys()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert new[f"model.layers.2.{name}.weight"].any()
    results = json.loads((expanded / "eval_results.json").read_text())
    assert results["eval_loss"] < first_evaluation(expanded)["eval_loss"]
    assert "| the 1 new one |" in (expanded / "README.md").read_text()


def test_evaluation_resumption_and_export_see_the_same_model(folder, expanded, tmp_path):
    before = json.loads((expanded / "eval_results.json").read_text())
    run(folder, "evaluate", "expanded", "model.new_layers=1")
    after = json.loads((expanded / "eval_results.json").read_text())
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    more = run(folder, "train", "expanded", "model.new_layers=1", "train.max_steps=6", "--allow-changed")
    assert [row["current_steps"] for row in read_jsonl(more / "trainer_log.jsonl") if "loss" in row] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    assert main(["export", str(more), "--output", str(tmp_path / "whole")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    trained = AutoModelForCausalLM.from_pretrained(more / "model")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, trained(tokens).logits)


def test_a_list_of_layers_and_one_that_is_not_there(folder, capsys):
    arguments = ["model.new_layers=2", "model.freeze.layers=[0, -1]", "train.max_steps=1", "train.save_every_steps=1"]
    chosen = run(folder, "train", "chosen", "model.new_tokens.plain=[capital]", *arguments)
    assert main(["export", f"{chosen}/checkpoints/1", "--output", f"{chosen}/exported"]) == 0
    written, wanted = (load_file(chosen / name / "model.safetensors") for name in ("exported", "model"))
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())
    trained = AutoModelForCausalLM.from_pretrained(chosen / "model").state_dict()
    base = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    # Layers 0 and 2 of the expanded model are layers 0 and 1 of the model.
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(trained["model.layers.2.mlp.up_proj.weight"], base["model.layers.1.mlp.up_proj.weight"])
    capsys.readouterr()
    arguments = ["train", str(folder / "c.yaml"), "run.name=wrong", "model.new_layers=2", "model.freeze.layers=[4]"]
    assert main(arguments) == 2
    assert "names layer 4, but the model has 4 layers; use 0 to 3, or -4 to -1" in capsys.readouterr().err
