"""Early stopping and the best model: a metric that no evaluation gives, and nothing that would compare it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from raysft.config.config import Config
from raysft.config.result_names import evaluated_sets, evaluation_names, has_foreign_metrics, score_names
from raysft.config.train import TrainSection
from raysft.metric_names import higher_is_better


def best_model(config: Config) -> Iterator[str]:
    """Yield what speaks against ``train.early_stopping``, ``train.keep_best`` and the metric that they go by."""
    train, named = config.train, config.train.comparing_key
    if named is None:
        for key in ("best_metric", "best_mode"):
            if (value := getattr(train, key)) != TrainSection.model_fields[key].default:
                yield (
                    f"train.{key}={value} determines which evaluation is the best, but no setting compares evaluations; set "
                    f"train.keep_best=true or train.early_stopping.patience, or remove {key}"
                )
        return
    if train.best_metric.startswith("predict_"):
        yield from _generated(config)
    elif train.best_metric.startswith("eval_") or not evaluated_sets(config):
        yield from _evaluated(config, named)
    else:
        yield _unknown(config)
    if train.best_mode is None and higher_is_better(train.best_metric) is None:
        yield f"train.best_metric={train.best_metric} needs a direction, but train.best_mode=null; set it to min or max"


def _evaluated(config: Config, named: str) -> Iterator[str]:
    train = config.train
    if not train.evaluates_on_the_way:
        yield f"{named} compares evaluations, but train.eval_every_steps is not set; set it, or train.eval_every_epochs"
    if not config.data.eval and not config.data.holdout:
        yield f"{named} compares evaluations, but there is no evaluation data; set data.eval or data.holdout"
    if train.best_metric not in evaluation_names(evaluated_sets(config)):
        yield _unknown(config)


def _generated(config: Config) -> Iterator[str]:
    """Metrics of predictions during training."""
    named = f"train.best_metric={config.train.best_metric}"
    every, instead = config.generate.every_steps, "or set train.best_metric=eval_loss"
    if config.stage != "sft":
        yield f"{named} scores predictions, but stage={config.stage} trains on raw text; use eval_loss"
    elif not config.generate.enabled:
        yield f"{named} scores predictions, but generate.enabled=false; set it to true, {instead}"
    elif not config.generates:
        yield (
            f"{named} scores predictions, but there are no prompts; set data.eval, data.holdout or generate.sources, {instead}"
        )
    elif every is None:
        yield (
            f"{named} compares predictions made during training, but generate.every_steps=null generates them only at the end; "
            f"set it to a number of steps, {instead}"
        )
    if config.train.best_metric not in score_names(config) and not has_foreign_metrics(config):
        yield _unknown(config)


def _unknown(config: Config) -> str:
    metric, measures = config.train.best_metric, evaluation_names(evaluated_sets(config))
    known = [name for name in measures if higher_is_better(name) is not None] + score_names(config, ("",))
    near = [name for name in (f"eval_{metric}", f"predict_{metric}") if name in known]
    near += difflib.get_close_matches(metric, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
    return f"train.best_metric={metric} is not a result of this run; {hint}"
