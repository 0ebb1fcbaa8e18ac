"""How much of the variation of a sweep's results each setting explains, by Optuna's evaluators."""

from __future__ import annotations

from typing import Any

from raysft.report.axes import category
from raysft.report.read_run import finite
from raysft.report.sweep import Sweep

FEWEST = 12
"""Number of configurations from which settings are weighed."""
BEST = 0.25
"""Share of the configurations that are compared with all: of Optuna's 0.1, a small sweep has one, which says nothing."""
CITATION = "PED-ANOVA (Watanabe, Bansal and Hutter 2023), by Optuna"


def importances(sweep: Sweep) -> tuple[list[tuple[str, float]], str]:
    """The importance of each setting for the first objective, the largest first.

    Returns:
        (dotted key, share of 1) of each setting, and why there are none if there are none.
    """
    found = sweep.configurations
    keys = [key for key in sweep.keys if all(key in one.values for one in found)]
    keys = [key for key in keys if len({repr(one.values[key]) for one in found}) > 1]
    if len(found) < FEWEST:
        return [], f"needs {FEWEST} finished configurations, but there are {len(found)}"
    if len(keys) < 2:
        return [], "needs two settings that vary in all configurations"
    try:
        import optuna
    except ImportError:
        return [], "needs Optuna; install it with pip install 'raysft[tune]'"
    _, lowest = sweep.objectives[0]
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="minimize" if lowest else "maximize")
        distributions = {key: _distribution(sweep, key) for key in keys}
        for one in found:
            values = {key: _value(one.values[key], distributions[key]) for key in keys}
            study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=one.means[0]))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(before)
    return list(shares.items()), ""


def _distribution(sweep: Sweep, key: str) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    axis = sweep.axis(key)
    values = [one.values[key] for one in sweep.configurations]
    if axis.categories or any(finite(value) is None for value in values):
        return CategoricalDistribution(tuple(sorted({category(value) for value in values})))
    return FloatDistribution(float(min(values)), float(max(values)), log=axis.log)


def _value(value: Any, distribution: Any) -> Any:
    return category(value) if hasattr(distribution, "choices") else float(value)
