"""Names of the results that a run will have, as far as its config tells. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from raysft.config.config import Config
from raysft.metric_names import EVALUATION, METRIC_KEYS

GENERATE = "set stage=sft and generate.enabled=true, and give data.eval, data.holdout or generate.sources"
"""What makes a run generate."""


def evaluated_sets(config: Config) -> list[str]:
    """Names of the evaluation sets."""
    held_out = config.data.train if config.data.holdout else []
    return [source.name for source in [*config.data.eval, *held_out]]


def evaluation_names(sets: Sequence[str], measures: Collection[str] = EVALUATION.keys()) -> list[str]:
    """Keys of ``eval_results.json``; with several sets, those of each set follow those over all of them.

    >>> evaluation_names(["a"])
    ['eval_loss', 'eval_perplexity', 'eval_accuracy', 'eval_tokens']
    """
    groups = ["", *(f"{name}_" for name in sets if len(sets) > 1)] if sets else []
    return [f"eval_{group}{measure}" for group in groups for measure in measures]


def predicted_sources(config: Config) -> list[str]:
    """Names of the sources that a run generates for."""
    return config.generate.sources or evaluated_sets(config)


def predicted_groups(sources: Sequence[str]) -> list[str]:
    """Beginnings of the keys of ``predict_results.json`` after ``predict_``: over all sources, and with several for each."""
    return ["", *(f"{source}_" for source in sources if len(sources) > 1)]


def score_names(
    config: Config, ends: tuple[str, ...] = ("", "_low", "_high"), sources: Sequence[str] | None = None
) -> list[str]:
    """Keys of ``predict_results.json`` that built-in metrics give for the trained model.

    Args:
        config: of the run.
        ends: of the names: of a score, and of the ends of its interval.
        sources: those whose predictions can be scored. Default: all that the run generates for.
    """
    if not config.generates:
        return []
    keys = dict.fromkeys(key for name in config.generate.metrics for key in METRIC_KEYS.get(name, ()))
    groups = predicted_groups(predicted_sources(config) if sources is None else sources)
    return [f"predict_{group}{key}{end}" for group in groups for key in keys for end in ends]


def has_foreign_metrics(config: Config) -> bool:
    """Return True if a module of another author scores predictions: the names of its values are known once it has."""
    return config.generates and any(name not in METRIC_KEYS for name in config.generate.metrics)
