"""The best model by the loss and by the accuracy, on two workers, of which one is killed, and after a change of the metric."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import raysft
from raysft.cli import main
from raysft.config import load
from raysft.storage.json_files import read_jsonl
from raysft.train.checkpoint.catalog import complete
from raysft.train.checkpoint.cursor import Cursor
from tests.processes import children_named
from tests.tiny import tiny_folder
from tests.training import plain_model

pytestmark = pytest.mark.usefixtures("local_ray")

STEPS = 12
CONFIG = """
run: {{storage: {folder}/runs, seed: 1}}
model: {{path: {folder}/base, finetuning: full}}
data:
  train: [{{name: few, path: {folder}/chat.jsonl, max_examples: 12}}]
  eval: [{{name: others, path: {folder}/chat.jsonl, slice: "20:44"}}]
  sequence_length: 128
train:
  max_steps: 12
  global_batch_size: 4
  learning_rate: 1.0e-2
  schedule: constant
  eval_every_steps: 1
  save_every_steps: 1
  keep_last: 20
  keep_best: true
  trackers: []
scaling: {{num_workers: 2, cpus_per_worker: 0.75, threads_per_worker: 1}}
generate: {{enabled: false}}
"""
"""Few examples, learnt by heart: the loss on others rises before their accuracy falls."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    return tiny_folder(folder, CONFIG.format(folder=folder), file="best.yaml", chat=60)


class KillAWorker:
    """Kills a training worker when a step is done, once."""

    def __init__(self, step: int) -> None:
        self.step, self.killed = step, 0

    def on_step(self, record) -> None:
        if record.current_steps == self.step and not self.killed:
            next(children_named("RayTrainWorker")).kill()
            self.killed += 1


@pytest.fixture(scope="module")
def by_perplexity(folder) -> Path:
    """Killed three steps before its end."""
    kill = KillAWorker(step=STEPS - 2)
    raysft.run_sft(
        load(folder / "best.yaml", ["run.name=lowest", "train.best_metric=eval_perplexity"]), callbacks=[kill]
    )
    assert kill.killed == 1
    return folder / "runs" / "lowest"


@pytest.fixture(scope="module")
def by_accuracy(folder) -> Path:
    assert main(["run", str(folder / "best.yaml"), "run.name=highest", "train.best_metric=eval_accuracy"]) == 0
    return folder / "runs" / "highest"


def evaluations(run: Path, metric: str) -> list[float]:
    """Values after each step, from the first."""
    found = {line["current_steps"]: line[metric] for line in read_jsonl(run / "trainer_log.jsonl") if metric in line}
    return [found[step] for step in range(1, STEPS + 1)]


def results(run: Path, stage: str) -> dict:
    return json.loads((run / f"{stage}_results.json").read_text())


def model_of_checkpoint(run: Path, step: int) -> torch.nn.Module:
    """The model that a checkpoint holds, put together from the parts of all workers."""
    place = next(one for one in complete(run / "checkpoints") if Cursor.read(one).step == step)
    model = plain_model(run.parent.parent / "base")
    weights = {name: weight.data.view(-1) for name, weight in model.named_parameters()}
    left = sum(weight.numel() for weight in weights.values())
    for part in sorted(place.local.glob("part_*.safetensors")):
        for key, values in load_file(part).items():
            kind, start, name = key.split(":", 2)
            if kind == "weight":
                weights[name.removeprefix("model.")][int(start) : int(start) + values.numel()] = values.view(-1).float()
                left -= values.numel()
    assert left <= 0, "the parts hold all weights"
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40).view(2, 20)).logits


def test_loss_and_accuracy_choose_different_steps(by_perplexity, by_accuracy):
    losses, accuracies = evaluations(by_accuracy, "eval_loss"), evaluations(by_accuracy, "eval_accuracy")
    lowest, highest = 1 + losses.index(min(losses)), 1 + accuracies.index(max(accuracies))
    assert lowest < highest, "the test needs a training whose loss rises while its accuracy still does"
    chosen = results(by_accuracy, "train")
    assert (chosen["best_step"], chosen["best_eval_accuracy"]) == (highest, max(accuracies))
    assert results(by_accuracy, "eval")["eval_loss"] == losses[highest - 1]
    chosen = results(by_perplexity, "train")
    assert chosen["best_step"] == lowest
    assert chosen["best_eval_perplexity"] == pytest.approx(math.exp(min(losses)), rel=1e-5)
    for run in (by_perplexity, by_accuracy):
        assert not {"best_eval_loss"} & results(run, "train").keys()
        state, chosen = json.loads((run / "trainer_state.json").read_text()), results(run, "train")
        assert state["best_global_step"] == chosen["best_step"]
        assert state["best_metric"] in chosen.values()


@pytest.mark.parametrize("name", ["by_perplexity", "by_accuracy"])
def test_the_model_is_that_of_the_chosen_step(request, name):
    run = request.getfixturevalue(name)
    step, kept = results(run, "train")["best_step"], logits(plain_model(run / "model"))
    torch.testing.assert_close(kept, logits(model_of_checkpoint(run, step)), rtol=0, atol=1e-6)
    other = 6 if step != 6 else 7
    assert not torch.allclose(kept, logits(model_of_checkpoint(run, other)), atol=1e-2)


def test_another_metric_does_not_compare_with_the_values_of_the_one_before(folder, by_perplexity, capsys):
    """A perplexity of 30, as a value of the new metric, would be better than any accuracy."""
    more = [
        str(folder / "best.yaml"),
        "run.name=lowest",
        f"train.max_steps={STEPS + 1}",
        "train.best_metric=eval_accuracy",
    ]
    assert main(["train", *more]) == 2
    told = capsys.readouterr().err
    assert "train.best_metric" in told
    assert "--allow-changed" in told
    assert main(["train", *more, "--allow-changed"]) == 0
    chosen = results(by_perplexity, "train")
    assert chosen["best_step"] == STEPS + 1, "the only evaluation since then"
    assert chosen["best_eval_accuracy"] == results(by_perplexity, "eval")["eval_accuracy"]
    assert "best_eval_perplexity" not in chosen


OWN = """
import datasets
import evaluate


class Own(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"errors": sum(a != b for a, b in zip(predictions, references))}
"""
"""A metric whose results nobody knows before it runs."""


def test_a_metric_that_the_first_predictions_lack_ends_the_run_with_a_checkpoint_to_go_on_from(folder, capsys):
    (folder / "own.py").write_text(OWN)
    command = ["train", str(folder / "best.yaml"), "run.name=own", "train.max_steps=3", "scaling.num_workers=1"]
    command += [
        "generate.enabled=true",
        "generate.every_steps=2",
        "generate.max_examples=2",
        "generate.max_new_tokens=4",
    ]
    command += [f"generate.metrics=[{folder / 'own.py'}]", "train.best_mode=min", "train.save_every_steps=null"]
    assert main([*command, "train.best_metric=predict_misses"]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(
        "raysft: failed: stopped after step 2: train.best_metric=predict_misses is not a result of this run"
    )
    assert "use one of predict_errors" in told
    run = folder / "runs" / "own"
    assert [Cursor.read(one).step for one in complete(run / "checkpoints")] == [2]
    assert main([*command, "train.best_metric=predict_errors", "--allow-changed"]) == 0
    chosen = results(run, "train")
    assert chosen["best_step"] in (2, 3)
    assert 0 <= chosen["best_predict_errors"] <= 2
    assert results(run, "eval")["eval_loss"] == pytest.approx(
        {
            line["current_steps"]: line["eval_loss"]
            for line in read_jsonl(run / "trainer_log.jsonl")
            if "eval_loss" in line
        }[chosen["best_step"]]
    )
