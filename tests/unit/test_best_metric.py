"""A best model by scores of predictions: what can never have such a score is refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config, parse, with_overrides
from raysft.data.prepare import PreparedData, prepare
from raysft.data.shards import ray_pipeline
from raysft.generate.prediction_store import prediction_identity
from raysft.run.best_metric import check_best_metric
from tests.messages import holds, refusal
from tests.shards import write_records

ANSWERED = [["q", "a"], ["r", "b"]]
QUESTIONS = [{"instruction": "one"}, {"prompt": "two"}]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setattr(ray_pipeline, "LOCAL_BYTES", 1 << 40)


def config_of(folder: Path, **settings: Any) -> Config:
    """A training of 6 steps, with one set with answers and one without."""
    write_records(folder / "a.jsonl", ANSWERED)
    write_records(folder / "e.jsonl", QUESTIONS)
    write_records(folder / "f.jsonl", ANSWERED)
    sets = [{"name": name, "path": str(folder / f"{name}.jsonl")} for name in "ef"]
    config = parse(
        {
            "run": {"storage": str(folder)},
            "model": {"path": "m"},
            "data": {"train": [{"name": "a", "path": str(folder / "a.jsonl")}], "cache": str(folder / "cache")}
            | {"eval": sets, "sequence_length": 64},
            "train": {"max_steps": 6, "global_batch_size": 1, "keep_best": True, "best_metric": "predict_rouge-l"},
            "generate": {"every_steps": 2},
        }
    )
    return with_overrides(config, {key.replace("__", "."): value for key, value in settings.items()})


def checked(folder: Path, model: Any, done: int = 0, known: bool = False, **settings: Any) -> PreparedData:
    config = config_of(folder, **settings)
    prepared = prepare(config, str(model))
    assert prepared.train_rows.row_plan.steps == 6
    check_best_metric(config, prepared, done, known)
    return prepared


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"generate__every_steps": 7},
            "train.best_metric=predict_rouge-l … 7 steps … 6 in all … generate.every_steps=7",
        ),
        ({"generate__every_steps": 4, "done": 5}, "train.best_metric=predict_rouge-l … 6 in all, of which 5 are done"),
        (
            {"generate__sources": ["e"]},
            "train.best_metric=predict_rouge-l … no example of e … answer … generate.sources",
        ),
        (
            {"train__best_metric": "predict_e_rouge-l"},
            "train.best_metric=predict_e_rouge-l … only f … use predict_rouge-l",
        ),
        (
            {"train__best_metric": "predict_f_rouge-l"},
            "train.best_metric=predict_f_rouge-l … only f … use predict_rouge-l",
        ),
    ],
)
def test_a_metric_that_no_prediction_will_have_is_refused(tmp_path, model, settings, message):
    assert holds(refusal(lambda: checked(tmp_path, model, **settings)), message)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"generate__every_steps": 6},
        {"generate__every_steps": 4, "done": 4},  # which is made up for where the training resumes
        {"generate__every_steps": 4, "done": 5, "known": True},
        {"generate__every_steps": 7, "train__keep_best": False, "train__best_metric": "eval_loss"},
        {"generate__sources": ["f"], "train__best_metric": "predict_rouge-l_low"},
        {"generate__sources": ["a", "f"], "train__best_metric": "predict_f_rouge-l"},
    ],
)
def test_a_metric_that_predictions_will_have_is_not(tmp_path, model, settings):
    assert checked(tmp_path, model, **settings).prompts


def test_examples_that_are_not_asked_have_no_score(tmp_path, model):
    """Of three examples, the first is asked (``generate.max_examples``), and it has no answer."""
    settings = {"generate__max_examples": 1, "generate__sources": ["f"]}
    config_of(tmp_path)
    config = config_of(tmp_path, **settings)
    write_records(tmp_path / "f.jsonl", [QUESTIONS[0], *ANSWERED])
    prepared = prepare(config, str(model))
    assert "no example of f" in refusal(check_best_metric, config, prepared)
    check_best_metric(with_overrides(config, {"generate.max_examples": 3}), prepared)


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"generate.max_new_tokens": 9}, False),
        ({"generate.max_examples": 1}, False),
        ({"run.seed": 9}, False),  # answers are sampled
        ({"generate.every_steps": 3}, True),
        ({"generate.batch_size": 3}, True),
        ({"generate.metrics": ["similarity", "chrf"]}, True),
        ({"train.learning_rate": 1.0}, True),
    ],
)
def test_settings_that_decide_the_answers_decide_whether_scores_are_comparable(tmp_path, changed, same):
    config = config_of(tmp_path)
    other = with_overrides(config, changed)
    assert (prediction_identity(config, ["k"]) == prediction_identity(other, ["k"])) == same
    assert prediction_identity(config, ["k"]) != prediction_identity(config, ["l"])
