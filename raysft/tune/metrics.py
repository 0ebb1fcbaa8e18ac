"""Which metrics the runs of a sweep can give, as far as their config tells."""

from __future__ import annotations

from collections.abc import Iterable

from raysft.config import Config
from raysft.errors import RequestError
from raysft.generate.metrics import METRIC_KEYS
from raysft.telemetry.events import TRAIN_RESULTS, Evaluation, evaluation_results

GENERATE = "set stage=sft and generate.enabled=true, and give data.eval, data.holdout or generate.sources"
"""What makes a run generate."""


def check_metric(config: Config, metric: str) -> None:
    """Refuse a metric that no run of this config gives.

    Metrics of other authors' ``evaluate`` modules, and results that only some runs have (``best_step``), are known after a run.

    Raises:
        RequestError: names the metrics that there are.
    """
    known = _evaluation_results(config)
    if metric.startswith("eval_"):
        remedy = _one_of(known) if known else "they evaluate nothing; set data.eval or data.holdout"
    elif metric.startswith(("predict_", "base_predict_")):
        known = _prediction_results(config)
        if known is None:
            return
        values = [name for name in known if not name.endswith(("_low", "_high"))]
        remedy = _one_of(values) if known else f"they generate nothing; {GENERATE}"
    else:
        known = [*known, *TRAIN_RESULTS]
        remedy = _one_of(known)
    if metric not in known:
        raise RequestError(f"tune.metric={metric!r} is not a result of these runs; {remedy}")


def _one_of(names: Iterable[str]) -> str:
    return f"use one of {', '.join(names)}"


def _evaluation_results(config: Config) -> list[str]:
    return list(evaluation_results([Evaluation(name, 0, 0.0, 0.0, 1) for name in _sets(config)]))


def _sets(config: Config) -> list[str]:
    held_out = config.data.train if config.data.holdout else []
    return [source.name for source in [*config.data.eval, *held_out]]


def _prediction_results(config: Config) -> list[str] | None:
    """Names of the metrics of predictions; None if a module of another author adds some."""
    if not config.generates:
        return []
    if any(name not in METRIC_KEYS for name in config.generate.metrics):
        return None
    keys = dict.fromkeys(key for name in config.generate.metrics for key in METRIC_KEYS[name])
    sources = config.generate.sources or _sets(config)
    groups = ["", *(f"{source}_" for source in sources if len(sources) > 1)]
    scores = [f"{group}{key}{end}" for group in groups for key in keys for end in ("", "_low", "_high")]
    others = ["runtime", "tokens_per_second", *(f"{group}examples" for group in groups)]
    models = ["", "base_"] if config.generate.compare_base else [""]
    return [f"{model}predict_{name}" for model in models for name in (*scores, *others)]
