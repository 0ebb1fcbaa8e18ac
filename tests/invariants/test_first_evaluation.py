"""The evaluation before the first step: what it depends on, and when the cache's is taken instead."""

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from raysft.config.evaluation_effects import BEARINGS, Bearing
from raysft.storage.path import StoragePath
from raysft.telemetry.events import EvaluationDone
from raysft.telemetry.results import Evaluation
from raysft.train.first_evaluation import _write
from tests.shards import the_set, written
from tests.training import Case, Result, make_config, prepare, rows_of, timeless, train_all

LORA = {"model.finetuning": "lora", "train.max_steps": 1}
OPTIMIZATION: dict[str, Any] = {
    "run.seed": 8,
    "train.epochs": 2,
    "train.max_steps": 2,
    "train.learning_rate": 3e-3,
    "train.weight_decay": 0.3,
    "train.betas": [0.5, 0.9],
    "train.epsilon": 1e-6,
    "train.max_grad_norm": 0.1,
    "train.schedule": "cosine_with_min_lr",
    "train.schedule_options": {"min_lr": 1e-5},
    "train.warmup_ratio": 0.5,
    "train.warmup_steps": 1,
    "train.loss": "eaft",
    "train.eaft_alpha": 2.0,
    "train.asft_alpha": 2.0,
    "train.z_loss": 0.1,
    "train.neftune_alpha": 5.0,
    "train.nonfinite": "skip",
    "train.eval_every_steps": 1,
    "train.eval_every_epochs": 1,
    "train.eval_delay": 1,
    "train.early_stopping.patience": 2,
    "train.early_stopping.threshold": 0.1,
    "train.keep_best": True,
    "train.best_metric": "eval_accuracy",
    "train.best_mode": "min",
    "train.save_every_steps": 1,
    "train.save_every_epochs": 1,
    "train.save_every_minutes": None,
    "train.keep_last": 1,
}
ADAPTER = {
    "run.seed": 9,
    "train.global_batch_size": 8,
    "train.label_smoothing": 0.2,
    "model.lora.rank": 3,
    "model.lora.alpha": 100.0,
    "model.lora.rslora": True,
    "model.lora.dropout": 0.5,
    "model.lora.loraplus_ratio": 4.0,
}
PLANTED = 7.25
"""A loss that no model here has, to tell what is taken from what is computed."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("first"))


def case(prepared, name: str, evaluations: Path | None = None, **settings: Any) -> Case:
    folder, model, manifest = prepared
    eval_set = {"name": "e", "path": str(folder / "data.jsonl")}  # settings that compare evaluations ask for one
    config = make_config(folder / name, model, {**LORA, "data.eval": [eval_set], **settings})
    size, steps = config.train.global_batch_size, config.train.max_steps
    assert isinstance(size, int)
    assert steps
    return Case(config, rows_of(manifest, size, steps=steps), evaluations=evaluations, eval_rows=rows_of(manifest))


def first(result: Result) -> EvaluationDone:
    assert not result.failure
    event = next(event for event in result.events if isinstance(event, EvaluationDone))
    assert event.record["current_steps"] == 0
    return event


def results(result: Result) -> dict[str, float]:
    return {key: value for key, value in timeless(first(result).record).items() if key.startswith("eval_")}


def test_settings_that_the_table_excludes_do_not_change_a_bit_of_it(prepared):
    half, full = {"model.dtype": "bfloat16"}, {"model.finetuning": "full"}
    groups = [
        [{}, OPTIMIZATION, ADAPTER],
        [half, {**OPTIMIZATION, **half}, {**ADAPTER, **half}],
        [full, {**OPTIMIZATION, **full}],
    ]
    cases = [
        [case(prepared, f"{number}-{index}", **settings) for index, settings in enumerate(group)]
        for number, group in enumerate(groups)
    ]
    computed = iter(train_all(list(itertools.chain(*cases))))
    for group in cases:
        evaluations = [results(next(computed)) for _ in group]
        assert evaluations == evaluations[:1] * len(group)
        keys = [each.config.evaluation_keys() for each in group]
        assert keys == keys[:1] * len(group)


def test_every_excluded_setting_of_model_and_optimization_was_tried():
    outside = {
        "train.compile": "in the tests of compiled layers",
        "train.eval_at_start": "decides whether there is one",
        "train.hang_minutes": "is the watchdog's",
        "train.max_failures": "is the launcher's",
        "train.max_hours": "is the driver's",
        "train.reference_model": "is a model beside the one that is evaluated",
        "train.router_aux_loss_coef": "is a loss of mixtures of experts alone",
        "train.trackers": "are the driver's",
        **dict.fromkeys(map("train.tracking.{}".format, ("project", "run_name", "tags", "group")), "is the driver's"),
    }
    excluded = {
        key
        for key, bearing in BEARINGS.items()
        if bearing in (Bearing.NONE, Bearing.ADAPTER) and key.startswith(("model.", "train.", "run.seed"))
    }
    assert excluded == OPTIMIZATION.keys() | ADAPTER.keys() | outside.keys()


@pytest.fixture(scope="module")
def kept(prepared):
    """Number of workers → (cache, training without a cache, training that filled it, training that took from it)."""
    found = {}
    for workers in (1, 2):
        cache = prepared[0] / f"cache-{workers}"
        zero: dict[str, Any] = {"train.zero_stage": 3} if workers == 2 else {}
        cases = [
            case(prepared, f"none-{workers}", **zero),
            case(prepared, f"fills-{workers}", cache, **zero, **{"train.learning_rate": 1e-3}),
            case(prepared, f"takes-{workers}", cache, **zero),
        ]
        found[workers] = (cache, *train_all(cases, workers))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_the_second_training_takes_what_the_first_one_computed(kept, workers):
    cache, none, fills, takes = kept[workers]
    assert len(list(cache.iterdir())) == 1
    assert [first(result).note for result in (none, fills, takes)] == ["", "", "from the cache"]
    assert timeless(first(none).record) == timeless(first(fills).record) == first(takes).record, "which took no time"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_is_the_same_whether_it_evaluated_or_not(kept, workers):
    _, none, _, takes = kept[workers]
    assert (none.losses, none.norms, none.evaluation) == (takes.losses, takes.norms, takes.evaluation)
    assert all((none.weights[name] == takes.weights[name]).all() for name in none.weights)


@pytest.fixture(scope="module")
def planted(prepared, kept) -> Path:
    """A copy of the cache of one worker that holds another number."""
    cache = prepared[0] / "planted"
    shutil.copytree(kept[1][0], cache)
    (file,) = cache.iterdir()
    _write(Evaluation("d", 0, PLANTED, 0.5, 9), StoragePath.of(file))
    return cache


def copied(cache: Path, name: str, change) -> Path:
    folder = cache.parent / name
    shutil.copytree(cache, folder)
    (file,) = folder.iterdir()
    file.write_text(change(file.read_text()))
    return folder


def test_only_what_this_training_would_compute_is_taken(prepared, kept, planted):
    folder, model, manifest = prepared
    again = written(the_set(make_config(folder, model, {"data.cache": str(folder / "again")}), str(model)), str(model))
    assert again.key == manifest.key
    assert again.shards != manifest.shards
    touched = folder / "touched"
    shutil.copytree(model, touched)
    os.utime(touched / "model.safetensors", ns=(1, 1))
    same = case(prepared, "same", planted)
    cases = {
        "other rate": case(prepared, "rate", planted, **{"train.learning_rate": 5e-4}),
        "other rank": case(prepared, "rank", planted, **{"model.lora.rank": 2, "run.seed": 4}),
        "micro_batch_size": case(prepared, "micro", planted, **{"train.micro_batch_size": 2}),
        "weights of another time": case(prepared, "time", planted, **{"model.path": str(touched)}),
        "data written again": Case(same.config, same.rows, evaluations=planted, eval_rows=rows_of(again)),
        "cut file": case(prepared, "cut", copied(planted, "cut-cache", lambda text: text[:40])),
        "changed number": case(prepared, "flip", copied(planted, "flip-cache", lambda text: text.replace("7.25", "7.5"))),
        "no JSON": case(prepared, "noise", copied(planted, "noise-cache", lambda text: "\0")),
    }  # fmt: skip
    found = dict(zip(cases, train_all(list(cases.values())), strict=True))
    taken = {name for name, result in found.items() if results(result)["eval_loss"] == PLANTED}
    assert taken == {"other rate", "other rank"}
    truth = results(kept[1][1])
    for name in found.keys() - taken:
        assert results(found[name])["eval_loss"] == pytest.approx(truth["eval_loss"], rel=1e-6), name
        assert not first(found[name]).note
    # What was damaged is whole again.
    (good,) = (json.loads(file.read_text()) for file in kept[1][0].iterdir())
    for name in ("cut-cache", "flip-cache", "noise-cache"):
        assert [json.loads(file.read_text()) for file in (folder / name).iterdir()] == [good]


def test_a_cache_that_cannot_be_written_ends_nothing(prepared, tmp_path):
    (tmp_path / "file").write_text("no folder")
    (result,) = train_all([case(prepared, "unwritable", tmp_path / "file" / "evaluations")])
    assert first(result).note.startswith("not kept in the cache (")
