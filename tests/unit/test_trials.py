"""Trials of a sweep: which metrics they can give, and what of a cluster they take."""

from __future__ import annotations

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.tune.trials import check_metric, concurrent_trials, with_engines

NODES = [Node(cpus=4.0)]


def config(data: dict | None = None, **sections) -> Config:
    data = {"train": [{"name": "a", "path": "a.jsonl"}]} | (data or {})
    return parse({"model": {"path": "m"}, "data": data, **sections})


GENERATES = [
    config(generate={"sources": ["a"]}),
    config({"holdout": 0.1}),
    config({"eval": [{"name": "b", "path": "b.jsonl"}]}),
]
GENERATES_NOTHING = [
    config(),
    config({"holdout": 0.1}, generate={"enabled": False}),
    config({"holdout": 0.1}, stage="pt"),
    config(generate={"enabled": False, "sources": ["a"]}),
]


@pytest.mark.parametrize("given", GENERATES)
def test_a_sweep_may_choose_by_what_its_runs_generate(given):
    assert given.generates
    check_metric(given, "predict_rouge-l")


@pytest.mark.parametrize("given", GENERATES_NOTHING)
def test_a_metric_of_generation_is_refused_where_nothing_is_generated(given):
    assert not given.generates
    with pytest.raises(RequestError, match=r"^tune.metric='predict_rouge-l'.*generate.sources$"):
        check_metric(given, "predict_rouge-l")


@pytest.mark.parametrize("given", GENERATES)
def test_a_trial_that_generates_has_its_engines_counted(given):
    placed = with_engines(given, NODES)
    assert placed.generate.num_actors == 1
    assert concurrent_trials(placed, NODES) == 2
    many = with_engines(config(generate={"sources": ["a"], "num_actors": 3}), NODES)
    assert concurrent_trials(many, NODES) == 1


@pytest.mark.parametrize("given", GENERATES_NOTHING)
def test_a_trial_that_generates_nothing_has_no_engines(given):
    assert with_engines(given, NODES).generate.num_actors is None


def test_engines_that_find_no_place_beside_a_trial_are_refused():
    with pytest.raises(RequestError, match=r"4.*generate\.enabled=false"):
        with_engines(config(generate={"sources": ["a"], "num_actors": 4}), NODES)
