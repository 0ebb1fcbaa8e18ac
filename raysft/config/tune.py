"""The ``tune`` section."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from raysft.config.section import Count, Options, Positive, Section

RANGES = ("uniform", "loguniform", "quniform", "randint", "lograndint")
"""Kinds of ranges in ``tune.space``."""
_FORMS = (
    f"use a list of values, {{choice: [...]}}, or a range, one of {', '.join(RANGES)}, for example {{uniform: [0, 1]}}"
)


def _known_values(given: Any) -> Any:
    """Return the values of a key in ``tune.space``, with the bounds of a range as numbers; raise ValueError if they are
    invalid."""
    if isinstance(given, list):
        if not given:
            raise ValueError("must not be empty")
        return given
    if not isinstance(given, dict) or len(given) != 1 or next(iter(given)) not in ("choice", *RANGES):
        raise ValueError(f"is neither a list of values nor a range; {_FORMS}")
    ((kind, values),) = given.items()
    shown = f"{{{kind}: {values}}}"
    if kind == "choice":
        if not isinstance(values, list) or not values:
            raise ValueError(f"{shown} has no values; give a list of values")
        return given
    bounds = _numbers(values)
    wanted = "[low, high, q]" if kind == "quniform" else "[low, high]"
    if bounds is None or len(bounds) != wanted.count(",") + 1:
        raise ValueError(f"{shown} does not have the numbers {wanted}; correct it")
    low, high = bounds[:2]
    if not math.isfinite(high - low):
        raise ValueError(f"{shown} is too wide for floating-point numbers; move its bounds closer together")
    if low >= high:
        raise ValueError(f"{shown} is empty, because {low:g} is not below {high:g}; give [low, high] in this order")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{shown} starts at {low:g}, which has no logarithm; use a lower bound above 0")
    if kind.endswith("randint"):
        if not all(bound == int(bound) for bound in bounds):
            raise ValueError(f"{shown} needs whole-number bounds; use those, or {kind.replace('randint', 'uniform')}")
        bounds = [int(bound) for bound in bounds]
    if kind == "quniform" and not (0 < bounds[2] <= high - low and math.isfinite((high - low) / bounds[2])):
        raise ValueError(f"{shown} needs a step q above 0 that fits between its bounds; correct it")
    return {kind: bounds}


def _numbers(values: Any) -> list[Any] | None:
    """Return numbers, also those that YAML reads as text (1e-5); None if something else is among them."""
    if not isinstance(values, list) or any(isinstance(value, bool) for value in values):
        return None
    try:
        numbers = [value if isinstance(value, int) else float(value) for value in values]
        return numbers if all(map(math.isfinite, numbers)) else None
    except (OverflowError, TypeError, ValueError):
        return None


Mode = Literal["min", "max"]


class TuneSection(Section):
    """The sweep of raysft tune."""

    space: dict[str, Annotated[Any, AfterValidator(_known_values)]] = {}
    """Config key → values to try; keys inside lists have indices (``data.train.0.weight``). A list, or ``{choice: [...]}``, names
    the values. A range is ``{uniform: [low, high]}``, ``{loguniform: [low, high]}`` (equally likely in each order of magnitude),
    ``{quniform: [low, high, q]}`` (low, low + q, low + 2q, … up to high), ``{randint: [low, high]}`` or ``{lograndint: [low,
    high]}`` (whole numbers, both ends included). For example ``{train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}}``."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """``grid``: every combination of lists; ``random``: independent draws; ``optuna``: draws near the best so far, with a
    tree-structured Parzen estimator (Bergstra et al. 2011; ``pip install 'raysft[tune]'``)."""
    num_samples: Positive | None = None
    """Number of different configurations that ``random`` and ``optuna`` try. The size of a grid follows from ``space``."""
    seed: Count = 0
    """Seed of the search, so that a restarted sweep draws the same configurations."""
    metric: str | Annotated[list[str], Field(min_length=1)] = "eval_loss"
    """Metric that trials are compared by: a key of ``all_results.json``. With a list, the sweep records the Pareto front (the
    configurations that no other one beats in all metrics), and ``best.yaml`` is the one of the front with the best first
    metric."""
    mode: Mode | Annotated[list[Mode], Field(min_length=1)] | None = None
    """``min``: the lowest value is best; ``max``: the highest. One value for all metrics, or a list with one for each. Default:
    ``min`` for losses and perplexities, ``max`` for accuracies and the built-in metrics of predictions; required for other
    metrics."""
    repeats: Positive = 1
    """Number of trials of each configuration, with the seeds ``run.seed``, ``run.seed`` + 1 and so on. Configurations are ranked
    by the mean, and the sweep reports when the best two cannot be told apart (Welch's t-test at 5 %, from 2 repeats)."""
    scheduler: Literal["none", "asha", "median", "pbt"] = "none"
    """Scheduler that stops or changes trials after each evaluation (``train.eval_every_steps``, ``train.eval_every_epochs``).
    ``asha`` stops trials that are worse than most others at the same step (asynchronous successive halving, Li et al. 2018);
    ``median`` stops those whose best value is worse than the median of the other trials' running means. A stopped trial keeps
    its results and a checkpoint, and generates no predictions. ``pbt`` lets trials that are behind continue from the
    checkpoints of better ones, with changed values (population-based training, Jaderberg et al. 2017); each trial is a member
    of the population."""
    scheduler_options: Options = {}
    """Options of the scheduler, with Ray Tune's names; times are in optimizer steps: for ``asha`` ``{grace_period: 20,
    reduction_factor: 3}``, for ``median`` ``{grace_period: 20, min_samples_required: 3}``, for ``pbt``
    ``{perturbation_interval: 20, quantile_fraction: 0.25, resample_probability: 0.25}``. Default of the first option of each:
    the step of the first evaluation."""
    max_concurrent: Positive | None = None
    """Maximum number of trials that run at the same time. Default: as many as the cluster can place. Elastic trials
    (``scaling.num_workers: [min, max]``) use fewer workers each if that lets this many run."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """Time limit in minutes, from the start of the first trial. After that, no new trials start, and running ones save a
    checkpoint and stop. The sweep ranks the trials that have finished. Run the same command again to continue with the
    others."""
    keep: Literal["all", "best"] = "all"
    """``best`` deletes the models and checkpoints of all trials but the best (with several metrics: those not on the Pareto
    front) as soon as that is known, and copies the best model into the sweep's directory, where ``all`` creates a link."""
    max_failures: Count = 0
    """How many times the sweep restarts a failed trial, from its newest checkpoint; before that, ``train.max_failures``
    restarts the workers of the trial's training. A trial that still fails does not end the sweep."""

    @property
    def metrics(self) -> list[str]:
        """``metric`` as a list."""
        return [self.metric] if isinstance(self.metric, str) else self.metric
