"""Whose weights a sweep keeps, and where the best model is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raysft.config import Config, parse
from raysft.tune.best_model import provide_model, remove_weights
from raysft.tune.ranking import Ranked
from raysft.tune.record import State, TrialRecord
from raysft.tune.results import write_best


def sweep(folder: Path, **tune: Any) -> Config:
    data = {"train": [{"name": "a", "path": "a.jsonl"}]}
    run = {"name": "s", "storage": str(folder)}
    return parse({"run": run, "model": {"path": "m"}, "data": data, "tune": {"keep": "best", **tune}})


def trials(config: Config, **given: tuple[State, dict[str, float]]) -> dict[str, TrialRecord]:
    """Records of trials with models and checkpoints; a name's first letter is its configuration."""
    records = {}
    for number, (name, (state, metrics)) in enumerate(given.items()):
        records[name] = TrialRecord(name, number, name[0], {"train.weight_decay": 0.0}, 0, state, 4, metrics)
        for folder in ("model", "checkpoints/00000004"):
            place = config.run_directory / "trials" / name / folder
            place.mkdir(parents=True)
            (place / "weights").write_text(name)
    return records


def kept(config: Config) -> list[str]:
    """Names of the trials that have both model and checkpoints; none may have one of them alone."""
    found = {
        folder: sorted(path.parent.name for path in (config.run_directory / "trials").glob(f"*/{folder}"))
        for folder in ("model", "checkpoints")
    }
    assert found["model"] == found["checkpoints"]
    return found["model"]


def test_the_others_go_as_soon_as_one_is_better(tmp_path):
    config = sweep(tmp_path)
    records = trials(
        config,
        a=("done", {"eval_loss": 2.0}),
        b=("done", {"eval_loss": 1.0}),
        c=("running", {"eval_loss": 3.0}),
        d=("failed", {}),
        e=("interrupted", {"eval_loss": 4.0}),
        f=("stopped", {"eval_loss": 5.0}),
    )
    remove_weights(config, records)
    assert kept(config) == ["b", "c", "d", "e"]


def test_all_are_kept_unless_the_best_alone_is_wanted(tmp_path):
    config = sweep(tmp_path, keep="all")
    remove_weights(config, trials(config, a=("done", {"eval_loss": 2.0}), b=("done", {"eval_loss": 1.0})), over=True)
    assert kept(config) == ["a", "b"]


def test_a_configuration_is_judged_when_all_its_repeats_have_ended(tmp_path):
    config = sweep(tmp_path, repeats=2)
    records = trials(
        config,
        a1=("done", {"eval_loss": 2.0}),
        a2=("done", {"eval_loss": 2.2}),
        b1=("done", {"eval_loss": 1.0}),  # its second seed may be worse than all others
    )
    remove_weights(config, records)
    assert kept(config) == ["a1", "a2", "b1"]
    records |= trials(config, b2=("done", {"eval_loss": 9.0}))
    remove_weights(config, records)
    assert kept(config) == ["a1", "a2"]


def test_the_pareto_front_is_kept(tmp_path):
    config = sweep(tmp_path, metric=["eval_loss", "eval_accuracy"], mode=["min", "max"])
    results = {"a": (1.0, 0.1), "b": (2.0, 0.9), "c": (3.0, 0.5)}
    records = trials(
        config, **{name: ("done", {"eval_loss": one, "eval_accuracy": two}) for name, (one, two) in results.items()}
    )
    remove_weights(config, records)
    assert kept(config) == ["a", "b"]


def test_a_population_needs_every_checkpoint_until_its_end(tmp_path):
    config = sweep(tmp_path, scheduler="pbt")
    records = trials(config, a=("done", {"eval_loss": 2.0}), b=("done", {"eval_loss": 1.0}))
    remove_weights(config, records)
    assert kept(config) == ["a", "b"]
    remove_weights(config, records, over=True)
    assert kept(config) == ["b"]


BEST = Ranked("a", {}, ("a1", "a2"), ((2.0,), (1.0,)))


def test_the_best_seed_of_the_best_configuration_has_its_model_in_the_sweeps_directory(tmp_path, monkeypatch):
    config = sweep(tmp_path, keep="all")
    trials(config, a1=("done", {"eval_loss": 2.0}), a2=("done", {"eval_loss": 1.0}))
    place = provide_model(config, BEST)
    model = config.run_directory / "best_model"
    assert place is not None
    assert place.local == model
    assert model.is_symlink()
    assert (model / "weights").read_text() == "a2"
    # The link is still right when the sweep's directory has moved.
    config.run_directory.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "best_model" / "weights").read_text() == "a2"
    (tmp_path / "moved").rename(config.run_directory)
    # Another best one takes its place, as a link and as a copy.
    provide_model(config, replace(BEST, results=((1.0,), (2.0,))))
    assert (model / "weights").read_text() == "a1"
    for _ in range(2):
        provide_model(sweep(tmp_path), BEST)
        assert not model.is_symlink()
        assert (model / "weights").read_text() == "a2"
    assert (config.run_directory / "trials" / "a1" / "model" / "weights").read_text() == "a1"


@pytest.mark.parametrize("keep", ["all", "best"])
def test_a_best_trial_without_a_model_has_none_to_offer(tmp_path, keep):
    config = sweep(tmp_path, keep=keep)
    assert provide_model(config, BEST) is None
    # And that of an earlier call is no longer the best.
    trials(config, b=("done", {"eval_loss": 2.0}))
    assert provide_model(config, Ranked("b", {}, ("b",), ((2.0,),)))
    assert (tmp_path / "s" / "best_model").exists()
    assert provide_model(config, BEST) is None
    assert not (tmp_path / "s" / "best_model").exists()


@pytest.mark.parametrize("relative", ["runs", "./runs/deep"])
def test_a_link_is_right_where_the_storage_is_a_relative_path(tmp_path, monkeypatch, relative):
    monkeypatch.chdir(tmp_path)
    config = sweep(Path(relative), keep="all")
    trials(config, a1=("done", {"eval_loss": 2.0}), a2=("done", {"eval_loss": 1.0}))
    provide_model(config, BEST)
    monkeypatch.chdir("/")
    assert (tmp_path / relative / "s" / "best_model" / "weights").read_text() == "a2"


def test_another_metric_neither_ends_the_only_model_nor_calls_it_the_best(tmp_path):
    """a was the best by the metric before, b is by this one, and has no weights any more."""
    config = sweep(tmp_path, metric="eval_accuracy", mode="max")
    place, best = config.run_directory / "best_model", Ranked("b", {}, ("b",), ((0.9,),))
    records = trials(
        config,
        a=("done", {"eval_loss": 1.0, "eval_accuracy": 0.1}),
        b=("done", {"eval_loss": 2.0, "eval_accuracy": 0.9}),
    )
    provide_model(config, Ranked("a", {}, ("a",), ((0.1,),)))
    for folder in ("model", "checkpoints"):
        shutil.rmtree(config.run_directory / "trials" / "b" / folder)
    assert provide_model(config, best) is None
    assert not place.exists()
    remove_weights(config, records, over=True)
    assert kept(config) == ["a"]


def test_a_copy_of_the_best_model_outlives_the_trial_that_it_came_from(tmp_path):
    config = sweep(tmp_path)
    trials(config, a1=("done", {"eval_loss": 2.0}), a2=("done", {"eval_loss": 1.0}))
    place = provide_model(config, BEST)
    write_best(config.run_directory, config, BEST)
    shutil.rmtree(config.run_directory / "trials")
    assert provide_model(config, BEST) == place
    assert (config.run_directory / "best_model" / "weights").read_text() == "a2"


def test_of_repeats_that_were_judged_before_the_best_one_with_a_model_is_taken(tmp_path):
    """With more repeats a configuration can become the best whose first seeds were removed."""
    config = sweep(tmp_path)
    trials(config, a1=("done", {"eval_loss": 2.0}), a2=("done", {"eval_loss": 1.0}))
    shutil.rmtree(config.run_directory / "trials" / "a2" / "model")
    provide_model(config, BEST)
    assert (config.run_directory / "best_model" / "weights").read_text() == "a1"
