"""The space of a sweep: what it holds, what is drawn from it, and what is refused."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from raysft.config import parse
from raysft.tune.space import Dimension, dimensions
from raysft.tune.trials import combinations, make_trial, probes, repeats
from tests.messages import holds, refusal

RATE = "train.learning_rate"


def config(space: dict, **tune):
    sources = [{"name": "a", "path": "a.jsonl"}, {"name": "b", "path": "b.jsonl"}]
    data = {"train": sources, "mixing": "all_exhausted"}
    return parse({"model": {"path": "m"}, "data": data, "tune": {"space": space, **tune}})


def draws(kind: str, values: list, count: int = 4000) -> list:
    numbers = random.Random(0)
    return [Dimension("k", kind, values).draw(numbers) for _ in range(count)]


def test_a_uniform_range_has_its_mean_in_the_middle_and_a_loguniform_one_its_median():
    drawn = draws("uniform", [2, 6])
    assert min(drawn) >= 2
    assert max(drawn) <= 6
    assert sum(drawn) / len(drawn) == pytest.approx(4, abs=0.1)
    drawn = sorted(draws("loguniform", [1e-6, 1e-2]))
    assert drawn[0] >= 1e-6
    assert drawn[-1] <= 1e-2
    assert math.log10(drawn[len(drawn) // 2]) == pytest.approx(-4, abs=0.15)


def test_whole_numbers_have_both_ends_and_steps_start_at_the_lower_one():
    assert Counter(draws("randint", [3, 5])).keys() == {3, 4, 5}
    assert Counter(draws("lograndint", [1, 4])).keys() == {1, 2, 3, 4}
    assert sorted(Counter(draws("quniform", [0.1, 0.5, 0.1]))) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert sorted(Counter(draws("quniform", [0, 1, 0.3]))) == [0, 0.3, 0.6, 0.9]
    assert Dimension("k", "quniform", [0.1, 0.5, 0.1]).size == 5


def test_a_grid_has_every_combination_with_keys_inside_lists_and_sections():
    space = {
        "data.train.0.weight": [1, 2],
        "model.lora.rank": {"choice": [4, 8, 16]},
        "train.loss": ["cross_entropy", "dft"],
    }
    trials = combinations(config(space))
    assert len(trials) == len({trial.name for trial in trials}) == 12
    found = {(t.config.data.train[0].weight, t.config.model.lora.rank, t.config.train.loss) for t in trials}
    assert found == {(w, r, loss) for w in (1, 2) for r in (4, 8, 16) for loss in ("cross_entropy", "dft")}
    assert all(trial.config.data.train[1].weight is None for trial in trials)


def test_the_name_of_a_trial_is_readable_and_follows_from_its_values():
    trial = make_trial(config({RATE: ["1e-5"]}), {RATE: "1e-5"})
    assert trial.values == {RATE: 1e-5}
    assert trial.name.startswith("learning_rate-1e-05-")
    drawn = make_trial(config({RATE: [1]}), {RATE: 0.00031622776601683794})
    assert drawn.name.startswith("learning_rate-0.00031623-")
    assert drawn.config.train.learning_rate == 0.00031622776601683794


def test_a_random_search_draws_the_same_again_and_more_begin_with_fewer():
    space = {RATE: {"loguniform": ["1e-5", 1e-2]}, "model.lora.rank": {"randint": [2, 4]}}
    few = combinations(config(space, search="random", num_samples=4))
    many = combinations(config(space, search="random", num_samples=9))
    assert [trial.name for trial in many[:4]] == [trial.name for trial in few]
    assert len({trial.name for trial in many}) == 9
    other = combinations(config(space, search="random", num_samples=4, seed=1))
    assert not {trial.name for trial in other} & {trial.name for trial in few}


def test_a_random_search_can_try_all_of_a_small_space():
    space = {"model.lora.rank": [4, 8], "train.epochs": {"randint": [1, 3]}}
    trials = combinations(config(space, search="random", num_samples=6))
    assert {tuple(trial.values.values()) for trial in trials} == {(r, e) for r in (4, 8) for e in (1, 2, 3)}


def test_repeats_differ_in_seed_and_name_alone():
    given = config({RATE: [1e-4]}, repeats=3)
    first, second, third = repeats(given, combinations(given)[0])
    assert first.name == combinations(config({RATE: [1e-4]}))[0].name, "raising tune.repeats keeps what is done"
    assert [trial.config.run.seed for trial in (first, second, third)] == [given.run.seed + k for k in range(3)]
    assert second.name == f"{first.name}-seed{given.run.seed + 1}"
    assert {trial.configuration for trial in (first, second, third)} == {first.name}
    assert second.values == first.values


def test_values_that_depend_on_each_other_are_probed_together():
    """train.eaft_alpha is refused without its loss, which is not the first of the list."""
    space = dimensions(
        config({"train.eaft_alpha": {"uniform": [0.5, 2]}, "train.loss": ["cross_entropy", "eaft"]},
               search="optuna", num_samples=2)
    )  # fmt: skip
    found = probes(config({RATE: [1]}), space)
    assert [trial.values["train.loss"] for trial in found["train.loss"]] == ["cross_entropy", "eaft"]


RANDOM = {"search": "random", "num_samples": 2}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({RATE: {"uniform": [1, 1]}}, "uniform: [1, 1] … is empty … not below 1"),
        ({RATE: {"uniform": [2, 1]}}, "is empty … low, high"),
        ({RATE: {"loguniform": [0, 1]}}, "loguniform: [0, 1] … above 0"),
        ({RATE: {"uniform": [0]}}, "uniform: [0] … [low, high]"),
        ({RATE: {"uniform": ["low", 1]}}, "numbers [low, high]"),
        ({RATE: {"uniform": [0, float("inf")]}}, "numbers [low, high]"),
        ({RATE: {"uniform": 3}}, "numbers [low, high]"),
        ({RATE: {"randint": [1, 10**400]}}, "numbers [low, high]"),
        ({RATE: {"uniform": [-1e308, 1e308]}}, "too wide for floating-point numbers"),
        ({RATE: {"quniform": [0, 1, 1e-320]}}, "a step q above 0"),
        ({RATE: {"quniform": [0, 1]}}, "[low, high, q]"),
        ({RATE: {"quniform": [0, 1, 0]}}, "needs a step q above 0"),
        ({RATE: {"quniform": [0, 1, 2]}}, "needs a step q above 0"),
        ({RATE: {"randint": [0, 1.5]}}, "randint: [0, 1.5] … whole-number bounds; use those, or uniform"),
        ({RATE: {"lograndint": [0, 4]}}, "above 0"),
        ({RATE: {"choice": []}}, "choice: [] … no value"),
        ({RATE: {"normal": [0, 1]}}, "is neither a list of values nor a range; use a list … lograndint"),
        ({RATE: {"uniform": [0, 1], "choice": [1]}}, "is neither a list of values nor a range"),
        ({RATE: 3}, "=3: is neither a list of values nor a range"),
        ({RATE: []}, "=[]: must not be empty"),
    ],
)
def test_an_impossible_set_of_values_is_refused_with_the_config(space, message):
    assert holds(refusal(config, space, **RANDOM), f"config: tune.space.{RATE} … {message}")


@pytest.mark.parametrize(
    ("space", "tune", "message"),
    [
        ({}, {}, "tune.space is empty"),
        ({RATE: {"uniform": [0.1, 1]}}, {}, f"tune.space: {RATE} is a range … list its values … tune.search=random"),
        ({RATE: [1]}, {"num_samples": 3}, "tune.num_samples=3 … all 1 combinations; remove it"),
        ({RATE: [1]}, {"search": "random"}, "tune.search=random needs tune.num_samples"),
        ({RATE: [1, 2]}, {"search": "random", "num_samples": 3}, "tune.num_samples=3 … has 2; lower it"),
        ({RATE: [1, 1.0, "1"]}, RANDOM, "tune.num_samples=2 … gave 1 different configurations"),
        ({"train.learning_rat": {"uniform": [0.1, 1]}}, RANDOM, "tune.space: unknown key train.learning_rat; did you mean"),
        ({"": [1]}, {}, "tune.space: unknown key ''; known keys: stage, run"),
        ({"train.max_steps": {"randint": [1, 10**30]}}, RANDOM, "tune.space: train.max_steps=1000 … equal to 2147483647"),
        ({"data.train.2.weight": [1, 2]}, RANDOM, "tune.space: data.train is a list of length 2, but '2'"),
        ({"model.path": {"uniform": [0, 1]}}, RANDOM, "tune.space: model.path=0: must be a valid string"),
        ({"model.lora.rank": {"uniform": [1, 8]}}, RANDOM, "tune.space: model.lora.rank=3.6737: must be a valid integer"),
        ({"train.epochs": {"randint": [0, 3]}}, RANDOM, "tune.space: train.epochs=0: must be greater than 0"),
        ({RATE: {"uniform": [-1, 1]}}, RANDOM, f"tune.space: {RATE}=-1"),
        ({"train.loss": ["cross_entropy", "mse"]}, RANDOM, "tune.space: train.loss='mse'"),
        ({"run.seed": [1, 2]}, {"repeats": 2}, "tune.space: run.seed varies with tune.repeats=2 already"),
        ({"model.lora": [{"rank": 2}], "model.lora.rank": [1]}, {}, "tune.space: model.lora.rank is part of model.lora"),
        ({"tune.seed": [1]}, {}, "tune.space: tune.seed is the same for all trials"),
        ({"run": [{"seed": 1}]}, {}, "tune.space: run is the same for all trials"),
        ({RATE: {"choice": list(range(1, 10_002))}}, RANDOM, f"tune.space: {RATE} has 10001 values … at most 10000; give fewer"),
        ({RATE: list(range(1, 200)), "train.epochs": list(range(1, 200))}, {}, "the sweep has 39601 trials … tune.search=random"),
        ({RATE: {"uniform": [0.1, 1]}}, {**RANDOM, "num_samples": 10**9}, "the sweep has 1e+09 trials … lower tune.num_samples"),
        ({RATE: [1, 2]}, {"repeats": 10**6}, "the sweep has 2e+06 trials … or lower tune.repeats=1000000"),
    ],
)  # fmt: skip
def test_a_space_that_does_not_suit_the_search_or_the_config_is_refused(space, tune, message):
    assert holds(refusal(lambda: combinations(config(space, **tune))), message)


def test_a_range_is_written_to_the_config_with_numbers():
    given = config({RATE: {"loguniform": ["1e-5", "1e-3"]}}, **RANDOM)
    assert given.tune.space == {RATE: {"loguniform": [1e-5, 1e-3]}}
