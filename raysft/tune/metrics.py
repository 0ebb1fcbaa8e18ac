"""Which metrics the runs of a sweep can give, as far as their config tells."""

from __future__ import annotations

from collections.abc import Iterable

from raysft.config import Config
from raysft.config.result_names import (
    GENERATE,
    evaluated_sets,
    evaluation_names,
    has_foreign_metrics,
    predicted_groups,
    predicted_sources,
    score_names,
)
from raysft.config.tune import TuneSection
from raysft.errors import RequestError
from raysft.metric_names import SPEED, directions
from raysft.telemetry.results import TRAIN_RESULTS


def check_metric(config: Config, metric: str) -> None:
    """Refuse a metric that no run of this config gives.

    Metrics of other authors' ``evaluate`` modules, and results that only some runs have (``best_step``), are known after a run.

    Raises:
        RequestError: names the metrics that there are.
    """
    sets = evaluated_sets(config)
    known = [*evaluation_names(sets), *evaluation_names(sets, SPEED)]
    if metric.startswith("eval_"):
        remedy = _one_of(known) if known else "they evaluate nothing; set data.eval or data.holdout"
    elif metric.startswith(("predict_", "base_predict_")):
        if has_foreign_metrics(config):
            return
        known = _prediction_results(config)
        values = [name for name in known if not name.endswith(("_low", "_high"))]
        remedy = _one_of(values) if known else f"they generate nothing; {GENERATE}"
    else:
        results = [*known, *_prediction_results(config)]
        near = [name for name in (f"eval_{metric}", f"predict_{metric}") if name in results]
        known = [*known, *TRAIN_RESULTS, f"best_{config.train.best_metric}"]
        remedy = f"did you mean {near[0]}?" if near else _one_of(known)
    if metric not in known:
        raise RequestError(f"tune.metric={metric!r} is not a result of these runs; {remedy}")


def check_directions(tune: TuneSection) -> None:
    """Refuse a metric of which raysft does not know whether its lowest or its highest value is best, unless the config says it.

    Raises:
        RequestError: there is such a metric.
    """
    for metric, highest in zip(tune.metrics, directions(tune.metrics, tune.mode), strict=False):
        if highest is None:
            raise RequestError(
                f"tune.metric={metric} may be best at its lowest or at its highest, but tune.mode=null; set it to min or max"
            )


def _one_of(names: Iterable[str]) -> str:
    return f"use one of {', '.join(names)}"


def _prediction_results(config: Config) -> list[str]:
    """Names of the metrics of predictions."""
    if not config.generates:
        return []
    scores = [name.removeprefix("predict_") for name in score_names(config)]
    others = [
        "runtime",
        "samples_per_second",
        "tokens_per_second",
        *(f"{group}examples" for group in predicted_groups(predicted_sources(config))),
    ]
    models = ["", "base_"] if config.generate.compare_base else [""]
    return [f"{model}predict_{name}" for model in models for name in (*scores, *others)]
