"""Training that chooses its best model by scores of predictions (``train.best_metric``) is refused if it will have none."""

from __future__ import annotations

from raysft.config import Config
from raysft.config.result_names import has_foreign_metrics, predicted_sources, score_names
from raysft.data.prepare import PreparedData
from raysft.data.shards.prompts import has_answered_prompt
from raysft.errors import RequestError


def check_best_metric(config: Config, prepared: PreparedData, done: int = 0, known: bool = False) -> None:
    """Refuse a metric of predictions that this training will never have.

    Args:
        config: of the run.
        prepared: its data.
        done: steps after which it resumes.
        known: True if it already has a best model to compare with.

    Raises:
        RequestError: no predictions are made, or none of those that the metric scores has an answer to compare with.
    """
    train, metric = config.train, config.train.best_metric
    if not train.goes_by_predictions:
        return
    named = f"train.best_metric={metric} scores predictions"
    every, steps = config.generate.every_steps, prepared.train_rows.row_plan.steps
    assert every is not None  # otherwise the config already reports a conflict
    if not known and steps // every <= (max(done, 1) - 1) // every:
        left = f"of which {done} are done" if done else "so it never happens"
        raise RequestError(
            f"{named} after every {every} steps, but the training has {steps} in all, {left}; lower "
            f"generate.every_steps={every}, or set train.best_metric=eval_loss"
        )
    most = config.generate.max_examples
    scored = [manifest.name for manifest in prepared.prompts if has_answered_prompt(manifest, most)]
    sources = predicted_sources(config)
    if not scored:
        raise RequestError(
            f"{named}, but no example of {', '.join(sources)} has a prompt and an answer; name other sources in "
            "generate.sources, or set train.best_metric=eval_loss"
        )
    possible, every_name = score_names(config, sources=scored), score_names(config)
    of_others = [name for name in sources if metric.startswith(f"predict_{name}_") and name not in scored]
    if metric not in possible and (metric in every_name or (has_foreign_metrics(config) and of_others)):
        of_all = [
            name for name in score_names(config, ("",), scored[:1]) if metric.endswith(name.removeprefix("predict_"))
        ]
        instead = of_all[0] if of_all else "a score over all sources"
        raise RequestError(
            f"train.best_metric={metric} is not a result of this run: of the sources of its predictions, only "
            f"{', '.join(scored)} has examples with a prompt and an answer; use {instead}, or name other sources in "
            "generate.sources"
        )
