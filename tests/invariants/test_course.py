"""Non-finite steps, early stopping, the best model, and offloading."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from raysft.data.shards.manifest import Manifest
from raysft.telemetry.events import EvaluationDone, StepRecord, StepSkipped, StoppedEarly, TrainingStopped
from tests.shards import the_set, written
from tests.training import (
    STEPS,
    Case,
    Result,
    assert_same,
    conversations,
    make_config,
    plain_model,
    prepare,
    rows_of,
    timeless,
    train_all,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Data with one record, ``data.jsonl:7``, that has a token whose embedding is NaN."""
    folder, model, _ = prepare(tmp_path_factory.mktemp("poisoned"))
    records = conversations(60)
    records[6]["messages"][0]["content"] = "§"
    (folder / "data.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    whole = plain_model(model)
    whole.config.tie_word_embeddings = False
    whole.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        whole.model.embed_tokens.weight[tokenizer("§").input_ids[-1]] = torch.nan
    whole.save_pretrained(model)
    config = make_config(folder, model)
    return folder, model, written(the_set(config, str(model)), str(model))


def step_with_the_record(manifest: Manifest) -> int:
    rows = rows_of(manifest, steps=100)
    at = [row for row in range(rows.row_plan.rows) if any(name.endswith("data.jsonl:7") for name in rows.records(row))]
    return at[0] // 4


@pytest.fixture(scope="module")
def broken(poisoned) -> dict[str, Result]:
    folder, model, manifest = poisoned
    settings = {
        "stop": {"train.zero_stage": 0},
        "skip": {"train.zero_stage": 0, "train.nonfinite": "skip"},
        "skip with ZeRO 2": {"train.zero_stage": 2, "train.nonfinite": "skip"},
        "skip with ZeRO 3": {"train.zero_stage": 3, "train.nonfinite": "skip"},
    }
    steps = step_with_the_record(manifest) + 3
    cases = [
        Case(make_config(folder, model, each, micro_batch_size=4, max_steps=steps), rows_of(manifest, steps=steps))
        for each in settings.values()
    ]
    return dict(zip(settings, train_all(cases), strict=True))


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_records(poisoned, broken):
    failure = broken["stop"].failure
    step = step_with_the_record(poisoned[2])
    assert failure.startswith(f"step {step + 1}: the loss is nan and the gradient norm")
    assert f"rows {4 * step} to {4 * step + 3}: d: " in failure
    assert failure.endswith("check these records, lower train.learning_rate, or set train.nonfinite=skip")
    assert len(broken["stop"].losses) == step


@pytest.mark.parametrize("case", ["skip", "skip with ZeRO 2", "skip with ZeRO 3"])
def test_such_a_step_can_be_skipped(poisoned, broken, case):
    result, step = broken[case], step_with_the_record(poisoned[2])
    assert not result.failure
    assert [math.isfinite(loss) for loss in result.losses] == [index != step for index in range(step + 3)]
    assert [event.step for event in result.events if isinstance(event, StepSkipped)] == [step + 1]
    weight = result.weights["model.layers.0.mlp.up_proj.weight"]
    assert np.isfinite(weight).all()
    np.testing.assert_allclose(weight, broken["skip"].weights["model.layers.0.mlp.up_proj.weight"], atol=1e-5)
    rates = [event.lr for event in result.events if isinstance(event, StepRecord)]
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * index / (step + 3))) for index in range(step + 3)]
    assert rates == pytest.approx(expected), "the learning rate advances in a skipped step too"


@pytest.fixture(scope="module")
def evaluated(prepared) -> dict[str, Result]:
    folder, model, manifest = prepared
    wild = {
        "train.learning_rate": 0.5,
        "train.max_grad_norm": 0.0,
        "train.eval_every_steps": 1,
        "train.schedule": "constant",
    }
    wild["data.eval"] = [{"name": "d", "path": str(folder / "data.jsonl")}]
    settings = {
        "whole": {**wild},
        "best": {**wild, "train.keep_best": True},
        "patient": {**wild, "train.early_stopping.patience": 2, "train.keep_best": True},
        "impatient": {**wild, "train.early_stopping.patience": 1},
        "accurate": {**wild, "train.keep_best": True, "train.best_metric": "eval_accuracy"},
    }
    cases = [
        Case(make_config(folder, model, each, micro_batch_size=4, max_steps=5), rows_of(manifest, steps=5))
        for each in settings.values()
    ]
    return dict(zip(settings, train_all(cases), strict=True))


def evaluations(result: Result, metric: str = "eval_loss") -> list[float]:
    records = [event.record for event in result.events if isinstance(event, EvaluationDone)]
    return [record[metric] for record in records if record["current_steps"] > 0]


def test_the_best_model_is_kept(evaluated):
    losses = evaluations(evaluated["best"])
    best = losses.index(min(losses))
    assert 0 <= best < len(losses) - 1, "the test needs a training that gets worse at the end"
    end = evaluated["best"].events[-1]
    assert end.train["best_step"] == best + 1
    assert end.train["best_eval_loss"] == end.eval["eval_loss"] == min(losses)
    assert not np.array_equal(
        evaluated["best"].weights["model.norm.weight"], evaluated["whole"].weights["model.norm.weight"]
    )
    assert not (evaluated["best"].model.parent / ".best").exists()


def test_the_best_may_be_the_most_accurate(evaluated):
    accuracies = evaluations(evaluated["accurate"], "eval_accuracy")
    best = accuracies.index(max(accuracies))
    assert best < len(accuracies) - 1, "the test needs a training that gets worse at the end"
    end = evaluated["accurate"].events[-1]
    assert end.train["best_step"] == best + 1
    assert end.train["best_eval_accuracy"] == end.eval["eval_accuracy"] == max(accuracies)
    assert end.eval["eval_loss"] == evaluations(evaluated["accurate"])[best], "all results are those of the kept model"
    assert "best_eval_loss" not in end.train


def test_the_kept_model_has_the_loss_that_it_was_kept_for(prepared, evaluated):
    from raysft.train.loss import TokenLoss
    from raysft.train.step import microbatches

    rows = rows_of(prepared[2], steps=5)
    model = TokenLoss(plain_model(evaluated["best"].model)).eval()
    with torch.no_grad():
        losses = [
            model(**part, score=True)[0].item()
            for batch in rows.steps(0, 0, 1)
            for part in microbatches(batch, 4, torch.device("cpu"))
        ]
    assert sum(losses) / rows.row_plan.step_loss_tokens.sum() == pytest.approx(
        min(evaluations(evaluated["best"])), rel=1e-5
    )


@pytest.mark.parametrize(("case", "patience"), [("patient", 2), ("impatient", 1)])
def test_a_training_without_improvement_stops(evaluated, case, patience):
    losses = evaluations(evaluated[case])
    best, since, expected = math.inf, 0, None
    for number, loss in enumerate(evaluations(evaluated["whole"]), 1):
        best, since = (loss, 0) if loss < best else (best, since + 1)
        if since == patience:
            expected = number
            break
    assert expected is not None
    assert expected < 5
    assert len(evaluated[case].losses) == expected
    assert [event.step for event in evaluated[case].events if isinstance(event, StoppedEarly)] == [expected]
    end = evaluated[case].events[-1]
    assert end.train["total_steps"] == expected
    assert end.train["planned_steps"] == 5
    assert end.eval["eval_loss"] == (min(losses) if case == "patient" else losses[-1])


OFFLOADED = {
    "optimizer, stage 1": {"train.zero_stage": 1, "train.offload.optimizer": "cpu"},
    "optimizer, stage 2": {"train.zero_stage": 2, "train.offload.optimizer": "cpu"},
    "optimizer, stage 3": {"train.zero_stage": 3, "train.offload.optimizer": "cpu"},
    "all, stage 3": {"train.zero_stage": 3, "train.offload.optimizer": "cpu", "train.offload.parameters": "cpu"},
}


@pytest.fixture(scope="module")
def offloaded(prepared) -> dict[str, Result]:
    folder, model, manifest = prepared
    settings = {"none": {}, **OFFLOADED}
    cases = [
        Case(make_config(folder, model, each, micro_batch_size=2), rows_of(manifest)) for each in settings.values()
    ]
    return dict(zip(settings, train_all(cases, world=2), strict=True))


@pytest.mark.parametrize("case", OFFLOADED)
def test_offloaded_states_do_not_change_the_training(offloaded, case):
    assert len(offloaded[case].losses) == STEPS
    assert_same(offloaded["none"][:4], offloaded[case][:4])


def test_results_without_the_metric_that_is_to_choose_end_the_training_with_a_checkpoint(prepared, tmp_path):
    folder, model, manifest = prepared
    sets = [{"name": name, "path": str(folder / "data.jsonl")} for name in "de"]

    def case(name: str, metric: str, **options: Any) -> Case:
        settings = {"data.eval": sets, "train.keep_best": True, "train.best_metric": metric}
        # Only the set d is evaluated here.
        return Case(make_config(tmp_path / name, model, settings, eval_every_steps=2), rows_of(manifest), **options)

    first = case("first", "eval_e_loss", keep=tmp_path / "kept")
    (stopped,) = train_all([first], 2)
    last = stopped.events[-1]
    assert isinstance(last, TrainingStopped)
    assert (last.step, last.failed, len(stopped.losses)) == (2, True, 2)
    assert last.reason.startswith("train.best_metric=eval_e_loss is not a result of this run; use one of eval_loss, ")
    assert not (stopped.model).exists()
    kept = tmp_path / "kept" / "checkpoint_2"
    whole, later = train_all([case("whole", "eval_loss"), case("later", "eval_loss", resume=kept)], 2)
    assert stopped.losses + later.losses == pytest.approx(whole.losses, rel=1e-6)
    assert evaluations(later) == pytest.approx(evaluations(whole), rel=1e-6), (
        "that of step 2, too, which nothing chose from"
    )
    ends = [timeless(result.events[-1].train) for result in (whole, later)]
    assert ends[0]["best_step"] == ends[1]["best_step"]
    assert ends[0]["best_eval_loss"] == pytest.approx(ends[1]["best_eval_loss"], rel=1e-6)
