"""Trials of a sweep: which metrics they can give, and what of a cluster they take."""

from __future__ import annotations

import pytest

from raysft.cluster.placement import Node
from raysft.config import Config, parse
from raysft.errors import RequestError
from raysft.tune.metrics import check_metric
from raysft.tune.trials import concurrent_trials, with_engines, with_share
from tests.messages import holds, refusal

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


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("train_los", "use one of eval_loss, … train_loss, "),
        ("rouge-l", "did you mean predict_rouge-l?"),
        ("b_loss", "use one of eval_loss, "),
        ("accuracy", "did you mean eval_accuracy?"),
        ("eval_los", "use one of eval_loss, "),
        ("eval_b_loss", "use one of eval_loss, "),  # only one of several sets has results of its own
        ("predict_rouge_l", "use one of predict_rouge-1, "),
        ("predict_bleu", "use one of predict_rouge-1, "),
        ("base_predict_rouge-l", "use one of predict_rouge-1, "),
    ],
)
def test_a_metric_that_no_run_has_is_refused(metric, remedy):
    given = config({"eval": [{"name": "b", "path": "b.jsonl"}]}, generate={"compare_base": False})
    message = refusal(check_metric, given, metric)
    assert holds(message, f"tune.metric={metric!r} is not a result of these runs; {remedy}")


def test_a_sweep_may_choose_by_the_best_value_of_each_trial():
    by = {"train": {"keep_best": True, "best_metric": "eval_accuracy", "eval_every_steps": 1}}
    given = config({"eval": [{"name": "b", "path": "b.jsonl"}]}, **by)
    check_metric(given, "best_eval_accuracy")
    message = refusal(check_metric, given, "best_eval_loss")
    assert holds(message, "tune.metric='best_eval_loss' is not a result of these runs; use one of … best_eval_accuracy")


def test_what_another_authors_metric_gives_is_known_after_a_run():
    given = config({"holdout": 0.1}, generate={"metrics": ["similarity", "own.py"]})
    check_metric(given, "predict_anything")


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


def elastic(fewest: int, most: int) -> Config:
    return config(scaling={"num_workers": [fewest, most]})


@pytest.mark.parametrize(
    ("cpus", "wanted", "trials"),
    [
        (16, None, 3),  # of 4 + 0.5 + 0.1 CPUs
        (16, 2, 3),  # more fit than are asked for
        (16, 6, 6),  # of 2 + 0.6
        (16, 9, 6),  # no more fit with two workers
        (3, None, 1),
    ],
)
def test_elastic_trials_count_with_their_most_workers_unless_more_trials_are_asked_for(cpus, wanted, trials):
    assert concurrent_trials(elastic(2, 4), [Node(cpus)], wanted) == trials


@pytest.mark.parametrize(
    ("nodes", "concurrent", "most"),
    [
        ([16.0], 3, 4),
        ([16.0], 4, 3),  # 4 trials of 3 + 0.6 CPUs are 14.4
        ([16.0], 6, 2),
        ([4.0], 1, 3),  # with 4 workers neither data tasks nor the trial's own process would find a CPU
        ([1.0, 1.0, 1.0], 1, 2),  # the third worker would leave no node to data tasks
    ],
)
def test_an_elastic_trial_takes_no_more_than_its_share(nodes, concurrent, most):
    given = [Node(cpus) for cpus in nodes]
    limited = with_share(elastic(2, 4), given, concurrent)
    assert limited.scaling.num_workers == (2, most)
    assert concurrent_trials(limited, given) >= concurrent


def test_an_elastic_trial_keeps_its_groups_of_workers_whole():
    groups = config(scaling={"num_workers": [2, 8], "sequence_parallel": 2})
    assert with_share(groups, [Node(16.0)], 2).scaling.num_workers == (2, 6)  # 2 trials of 7 + 0.6 CPUs would fit


def test_a_share_changes_no_numbers():
    fixed = config(scaling={"num_workers": 2})
    assert with_share(fixed, NODES, 1) == fixed
    limited = with_share(elastic(2, 4), NODES, 1)
    assert limited.numerics_keys() == elastic(2, 4).numerics_keys()
