"""Schedulers: their options, which Ray Tune itself looks at late or never, and what they know of earlier calls."""

from __future__ import annotations

import inspect

import pytest
from ray.tune import schedulers

from raysft.config import Config, parse, with_overrides
from raysft.tune.earlier_results import NOBODY, EarlierTrial, replay
from raysft.tune.schedulers import OURS, VALUES, check_scheduler, make_scheduler
from tests.messages import holds, refusal


def config(scheduler: str, **options: object) -> Config:
    tune = {"space": {"train.learning_rate": [1e-4]}, "scheduler": scheduler, "scheduler_options": options}
    sources = [{"name": "a", "path": "a.jsonl"}]
    return parse({"model": {"path": "m"}, "data": {"train": sources}, "train": {"eval_every_steps": 2}, "tune": tune})


def check(scheduler: str, **options: object) -> None:
    given = config(scheduler, **options)
    check_scheduler(given, [given])


@pytest.mark.parametrize("every", [{"train.eval_every_steps": 3}, {"train.eval_every_epochs": 0.5}])
def test_a_scheduler_decides_at_evaluations_by_steps_or_by_epochs(every):
    bare = with_overrides(config("asha"), {"train.eval_every_steps": None})
    message = refusal(lambda: check_scheduler(bare, [bare]))
    assert holds(message, "tune.scheduler=asha … train.eval_every_steps=null; set it, or train.eval_every_epochs")
    given = with_overrides(bare, every)
    check_scheduler(given, [given])


def test_every_option_of_the_schedulers_is_checked():
    known = {
        option
        for scheduler in ("AsyncHyperBandScheduler", "MedianStoppingRule", "PopulationBasedTraining")
        for option in inspect.signature(getattr(schedulers, scheduler)).parameters
    }
    assert known - set(OURS) == VALUES.keys()


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("asha", {"grace_period": 5, "reduction_factor": 1.5, "brackets": 2}),
        ("median", {"grace_period": 0.5, "min_samples_required": 1}),
        ("pbt", {"perturbation_interval": 3, "burn_in_period": 0, "quantile_fraction": 0.5, "resample_probability": 1}),
        ("pbt", {"perturbation_factors": [2, 0.5], "synch": True}),
    ],
)
def test_options_are_taken(scheduler, options):
    check(scheduler, **options)


@pytest.mark.parametrize(
    ("scheduler", "option", "value", "wanted"),
    [
        ("asha", "grace_period", 0, "a number above 0"),
        ("asha", "grace_period", None, "a number above 0"),
        ("asha", "brackets", 1.5, "a whole number above 0"),
        ("asha", "reduction_factor", float("inf"), "a number above 1"),
        ("median", "grace_period", "abc", "a number above 0"),
        ("median", "min_samples_required", 0, "a whole number above 0"),
        ("median", "min_samples_required", True, "a whole number above 0"),
        ("pbt", "resample_probability", 2, "a number from 0 to 1"),
        ("pbt", "perturbation_factors", [1.2], "a list of two numbers above 0"),
        ("pbt", "perturbation_factors", [0, 1], "a list of two numbers above 0"),
        ("pbt", "quantile_fraction", 0.6, "a number from 0 to 0.5"),
        ("pbt", "synch", 3, "true or false"),
    ],
)
def test_a_value_that_the_scheduler_could_not_use_is_refused(scheduler, option, value, wanted):
    message = refusal(lambda: check(scheduler, **{option: value}))
    assert holds(message, f"tune.scheduler_options: {option}={value!r} is not {wanted}; correct it")


def line(trial: str, state: str, step: int | None = None, **metrics: float) -> dict:
    return {"trial": trial, "state": state, "step": step, "metrics": metrics}


RECORD = [
    line("good", "running"),
    line("good", "running", 2, eval_loss=1.0),
    line("good", "running", 4, eval_loss=0.6),
    line("good", "done", 8, eval_loss=0.5),
    line("bad", "running"),
    line("bad", "running", 2, eval_loss=3.0),
    line("bad", "stopped", 2, eval_loss=3.0),
    line("cut", "running", 2, eval_loss=9.0),
    line("cut", "interrupted", 2, eval_loss=9.0),
]


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [("asha", {"reduction_factor": 2}), ("median", {"min_samples_required": 1})],
)
def test_a_scheduler_compares_with_the_trials_of_earlier_calls(scheduler, options):
    """A trial worse than those that ended is stopped at its first evaluation, and one that is better goes on, as in one call."""

    def decided(ended: list[str], loss: float) -> str:
        found = make_scheduler(config(scheduler, **options), first=2, steps=8, concurrent=1)
        replay(found, "eval_loss", ended, RECORD)
        new = EarlierTrial("new")
        found.on_trial_add(NOBODY, new)
        return found.on_trial_result(NOBODY, new, {"step": 2, "eval_loss": loss})

    assert decided([], 2.9) == "CONTINUE"
    assert decided(["good", "bad"], 2.9) == "STOP"
    assert decided(["good", "bad"], 0.4) == "CONTINUE"


def test_a_trial_is_compared_from_the_first_evaluation_on():
    found = make_scheduler(config("asha", reduction_factor=2), first=5, steps=40, concurrent=1)
    replay(found, "eval_loss", ["good"], RECORD)
    new = EarlierTrial("new")
    found.on_trial_add(NOBODY, new)
    decided = [found.on_trial_result(NOBODY, new, {"step": step, "eval_loss": 2.9}) for step in (4, 5)]
    assert decided == ["CONTINUE", "STOP"]
