"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raysft.config import TrainSection
from raysft.config.optimizers import EXTRAS, kind_of
from raysft.config.train import OffloadSection
from raysft.errors import RequestError, one_line
from raysft.train.optimizer_makers import MAKERS, make_by_name
from raysft.train.parameter_groups import trained

OF_MODELS = ("adam_mini", "badam")
"""Optimizers that read the model's config, or the names of its layers."""
SIDE = 64
"""Side of the matrices on which options are tried: as large as a projection's rank may be."""
PROBED_STEPS = 1000
"""Length of the schedule on which options are tried, if the config does not set it."""


def make_optimizer(model: nn.Module, train: TrainSection, loraplus_ratio: float | None = None) -> torch.optim.Optimizer:
    """Make the optimizer of the trained parameters. Weight decay does not apply to vectors (biases and norms).

    Args:
        model: has the parameters.
        train: the section of the config.
        loraplus_ratio: factor on the learning rate of LoRA's B matrices.

    Raises:
        RequestError: the optimizer's package is not installed, it refuses an option, or its operator cannot be compiled.
    """
    check_installed(train.optimizer)
    with _refusals("optimizer", train):
        return MAKERS.get(train.optimizer, make_by_name)(model, trained(model), train, loraplus_ratio)


@contextmanager
def _refusals(kind: str, train: TrainSection) -> Iterator[None]:
    """Turn a library's error about ``train.optimizer_options`` or ``train.schedule_options`` into a refusal."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # libraries have their own exceptions
        raise RequestError(
            f"train.{kind}={getattr(train, kind)} refuses train.{kind}_options={getattr(train, f'{kind}_options')} "
            f"({one_line(error)}); fix the options"
        ) from None


def check_installed(optimizer: str) -> None:
    """Check that the optimizer's package is installed.

    Raises:
        RequestError: it is not.
    """
    package = kind_of(optimizer).library
    if package in EXTRAS and importlib.util.find_spec(package) is None:
        raise RequestError(
            f"train.optimizer={optimizer} needs the package {package}, which is not installed; "
            f"run pip install 'raysft[{EXTRAS[package]}]' on every node"
        )


def check_options(train: TrainSection) -> None:
    """Check that optimizer and schedule accept their options, on a few small parameters, before there is a model.

    Many options are first read in a step, so it takes two steps.

    Raises:
        RequestError: they do not, or the optimizer's package is not installed.
    """
    check_installed(train.optimizer)
    if train.schedule_options:
        rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=train.learning_rate)
        make_lr_scheduler(rate, train, train.max_steps or PROBED_STEPS)
    if not train.optimizer_options or train.optimizer in OF_MODELS:
        return
    plain = train.model_copy(update={"offload": OffloadSection(), "optimizer_target": "all"})
    with torch.random.fork_rng([]), _refusals("optimizer", train):
        probe = nn.ModuleDict({"embed": nn.Embedding(SIDE, SIDE), "layer": nn.Linear(SIDE, SIDE)})
        optimizer = make_optimizer(probe, plain)
        for _ in range(2):
            for parameter in probe.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()


def make_lr_scheduler(optimizer: torch.optim.Optimizer, train: TrainSection, steps: int) -> Any:
    """Make the learning-rate schedule: warm-up, then ``train.schedule`` over exactly ``steps`` steps.

    Raises:
        RequestError: the schedule refuses an option.
    """
    warmup = warmup_steps(train, steps)
    options = dict(train.schedule_options)
    if train.schedule == "warmup_stable_decay":
        options.setdefault("num_decay_steps", max(1, steps // 10))
    if train.schedule == "cosine_with_min_lr" and not {"min_lr", "min_lr_rate"} & options.keys():
        options["min_lr_rate"] = 0.1
    # The import takes three seconds, and the driver, which imports this module, does not need it.
    from transformers import get_scheduler

    # Some schedules read the peak rate there. Optimizers with different rates per group have none.
    optimizer.defaults.setdefault("lr", train.learning_rate)
    with _refusals("schedule", train):
        schedule: Any = get_scheduler(
            train.schedule,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            scheduler_specific_kwargs=options or None,
        )
        for step in (warmup, (warmup + steps) // 2, steps):  # options are first read after the warm-up
            schedule.lr_lambdas[0](step)
    return schedule


def warmup_steps(train: TrainSection, steps: int) -> int:
    """Return the steps of the warm-up: ``train.warmup_steps``, or a fraction of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    # The first step of a warm-up has learning rate 0, so a one-step run must have no warm-up.
    return min(math.ceil(train.warmup_ratio * steps), steps - 1)


def go_to_step(lr_scheduler: Any, steps: int) -> None:
    """Set the learning rate to that of the step after the first ``steps`` steps."""
    # ``step`` increments ``last_epoch``; ``_step_count`` suppresses a warning about a call before the optimizer's first step.
    lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "last_epoch": steps - 1, "_step_count": steps + 2})
    lr_scheduler.step()
