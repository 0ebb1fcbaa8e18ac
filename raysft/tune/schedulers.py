"""Ray Tune's schedulers, which end trials or change their values while they train: what a sweep may ask of them."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.tune.ranking import Objectives
from raysft.tune.space import CHOICE, Dimension, dimensions

OURS = (
    *("arguments", "options", "self", "time_attr", "metric", "mode", "max_t", "hard_stop", "stop_last_trials"),
    *("min_time_slice", "hyperparam_mutations", "custom_explore_fn", "log_config", "require_attrs"),
)
"""Parameters of the schedulers that the sweep sets itself."""
CHANGEABLE = frozenset(
    [
        "train.learning_rate",
        "train.weight_decay",
        "train.betas",
        "train.epsilon",
        "train.max_grad_norm",
        "train.loss",
        "train.label_smoothing",
        "train.z_loss",
        "train.eaft_alpha",
        "train.neftune_alpha",
        "train.router_aux_loss_coef",
        "model.lora.dropout",
        "model.oft.dropout",
    ]
)
"""Keys that population-based training may change in the middle of training."""


def _is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """True for a finite number that is not below ``low`` or above ``high``."""
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_positive(value: Any) -> bool:
    return _is_number(value, 0) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "grace_period": ("a number above 0", _is_positive),
    "perturbation_interval": ("a number above 0", _is_positive),
    "burn_in_period": ("a number from 0", lambda value: _is_number(value, 0)),
    "brackets": ("a whole number above 0", _is_count),
    "min_samples_required": ("a whole number above 0", _is_count),
    "reduction_factor": ("a number above 1", lambda value: _is_number(value, 1) and value > 1),
    "quantile_fraction": ("a number from 0 to 0.5", lambda value: _is_number(value, 0, 0.5)),
    "resample_probability": ("a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
    "perturbation_factors": (
        "a list of two numbers above 0",
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value)),
    ),
    "synch": ("true or false", lambda value: isinstance(value, bool)),
}
"""What each option of a scheduler is, and whether a value is that. Tune looks at some of them when the first trial reports."""


def make_scheduler(config: Config, first: int, steps: int, concurrent: int) -> Any:
    """Make the scheduler of ``tune.scheduler``; None without one.

    Args:
        config: the config that all trials share.
        first: the earliest step after which a trial is evaluated.
        steps: most steps of any trial.
        concurrent: trials that may train at a time.

    Raises:
        RequestError: ``tune.scheduler_options`` has a wrong value.
    """
    tune = config.tune
    if tune.scheduler == "none":
        return None
    objectives = Objectives.of(tune)
    shared: dict[str, Any] = {
        "time_attr": "step",
        "metric": objectives.metrics[0],
        "mode": objectives.modes[0],
    }
    if tune.scheduler == "pbt":
        shared |= {"perturbation_interval": first, **_changes(dimensions(config), random.Random(tune.seed))}
    elif tune.scheduler == "asha":
        shared |= {"grace_period": first, "max_t": steps}
    else:
        shared |= {"grace_period": first}
    try:
        scheduler = _scheduler_class(tune.scheduler)(**{**shared, **tune.scheduler_options})
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(
            f"tune.scheduler_options={tune.scheduler_options}: {tune.scheduler} rejects them ({error}); correct the values"
        ) from None
    if tune.scheduler == "pbt":
        scheduler.concurrent = concurrent
    return scheduler


def _changes(space: Sequence[Dimension], numbers: random.Random) -> dict[str, Any]:
    """Return how population-based training changes values: by a step or a factor, or by a new draw, within the space."""
    from raysft.tune.trainable import PERTURBED

    def draw(dimension: Dimension) -> Callable[[], Any]:
        return lambda: dimension.draw(numbers)

    def within(values: dict[str, Any]) -> dict[str, Any]:
        changed = {one.key: one.nearest(values[PERTURBED][one.key]) for one in space}
        return {**values, PERTURBED: changed}

    mutations = {one.key: list(one.values) if one.kind == CHOICE else draw(one) for one in space}
    return {"hyperparam_mutations": {PERTURBED: mutations}, "custom_explore_fn": within, "log_config": False}


def check_scheduler(config: Config, trials: Sequence[Config]) -> None:
    """Refuse a scheduler that could not decide on these trials, and options that it does not have.

    Raises:
        RequestError: its options are unknown, or the trials give it nothing to decide on.
    """
    tune, name = config.tune, config.tune.scheduler
    if name == "none":
        if tune.scheduler_options:
            raise RequestError(
                f"tune.scheduler_options={tune.scheduler_options} needs a scheduler, but tune.scheduler=none; set one, or remove it"
            )
        return
    _check_options(name, tune.scheduler_options)
    metric, *others = Objectives.of(tune).metrics
    if others:
        raise RequestError(
            f"tune.scheduler={name} compares trials by one metric, but tune.metric={tune.metric}; use one, or tune.scheduler=none"
        )
    if not metric.startswith("eval_"):
        raise RequestError(
            f"tune.scheduler={name} decides by evaluations during training, but tune.metric={metric!r} is only known at its end; "
            "use a metric that starts with eval_, or tune.scheduler=none"
        )
    if not all(trial.train.evaluates_on_the_way for trial in trials):
        raise RequestError(
            f"tune.scheduler={name} decides by evaluations during training, but train.eval_every_steps=null; set it, or "
            "train.eval_every_epochs"
        )
    if name == "pbt":
        _check_population(config)


def _check_options(name: str, options: dict[str, Any]) -> None:
    from ray.tune.schedulers import PopulationBasedTraining

    scheduler = PopulationBasedTraining if name == "pbt" else _scheduler_class(name)
    known = [parameter for parameter in inspect.signature(scheduler).parameters if parameter not in OURS]
    for option, value in options.items():
        if option not in known:
            raise RequestError(f"tune.scheduler_options: {name} has no option {option}; use {', '.join(known)}")
        wanted, suits = VALUES[option]
        if not suits(value):
            raise RequestError(f"tune.scheduler_options: {option}={value!r} is not {wanted}; correct it")


def _check_population(config: Config) -> None:
    """Refuse what population-based training cannot do."""
    tune = config.tune
    if tune.search == "optuna":
        raise RequestError(
            "tune.scheduler=pbt changes the values of its trials, but tune.search=optuna needs values that stay the same; use "
            "tune.search=random"
        )
    if tune.repeats > 1:
        raise RequestError(
            f"tune.scheduler=pbt copies trials over each other, but tune.repeats={tune.repeats} compares seeds; set it to 1"
        )
    if config.train.optimizer == "badam":
        raise RequestError(
            "tune.scheduler=pbt copies checkpoints, but train.optimizer=badam has none; use another optimizer"
        )
    if config.train.keep_best:
        raise RequestError(
            "tune.scheduler=pbt copies trials over each other, but train.keep_best=true keeps an earlier model; set it to false"
        )
    for key in tune.space:
        if key not in CHANGEABLE:
            raise RequestError(
                f"tune.scheduler=pbt changes values during training, but {key} cannot change then; use "
                f"{', '.join(sorted(CHANGEABLE))}, or tune.scheduler=asha"
            )


def _scheduler_class(name: str) -> Any:
    from ray.tune import schedulers

    if name == "pbt":
        from raysft.tune.population import Population

        return Population
    return {"asha": schedulers.AsyncHyperBandScheduler, "median": schedulers.MedianStoppingRule}[name]
