"""What is found out before anything starts, so that nobody waits hours for a refusal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raysft.config import Config
from raysft.errors import RequestError
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.trackers import missing_tracker


def check_trackers(config: Config) -> None:
    """Find a tracker whose package is missing."""
    missing = missing_tracker(config.train.trackers)
    if missing:
        raise RequestError(
            f"train.trackers names {missing} and its package is not installed; pip install 'raysft[{missing}]', or take it out"
        )


def check_metrics(config: Config) -> None:
    """Find a misspelt metric."""
    from raysft.generate import metrics

    if config.generates:
        metrics.check(config)


def check_generation(config: Config, model: str) -> None:
    """Find out that the model cannot be generated with as asked."""
    from raysft.generate.engines import check_suitable

    if config.generates:
        check_suitable(config, model)


def check_tokens(used: Iterable[tuple[int, str]], rows: int | None, tokenizer: Any, named: str) -> None:
    """Find a text whose tokens the model has no embeddings for: a tokenizer may have been given more than its model was.

    Args:
        used: token ids, and where each of them stands.
        rows: how many tokens the model has embeddings for; None where it does not say.
        tokenizer: the one that made them.
        named: the model as messages name it, ``model.path=PATH``.
    """
    for token, where in used:
        if rows is not None and token >= rows:
            raise RequestError(
                f"{named}: its tokenizer has {len(tokenizer)} tokens and the model embeddings for {rows}; {where} holds token "
                f"{token} ({tokenizer.convert_ids_to_tokens(token)!r}); put the tokenizer that belongs to the model into its "
                f"folder, or resize the model's embeddings to {len(tokenizer)} (resize_token_embeddings) and save it"
            )


def check_engines(config: Config) -> None:
    """Find out that an engine is not installed or could not be placed."""
    from raysft.cluster.connect import alive_nodes
    from raysft.generate import engine_pool as engines
    from raysft.generate.engines import check_engine

    if config.generates:
        check_engine(config)
        engines.size_pool(config, alive_nodes(), batches=config.generate.num_actors or 1)


def refuse_other_model(config: Config) -> None:
    """A run generates with what it has trained, and its report tells of that."""
    if config.generate.model is not None:
        raise RequestError(
            f"generate.model={config.generate.model} is for raysft generate: a run generates with what it trains; take it out"
        )


def check_trained(config: Config, remedy: str = "") -> None:
    """Refuse what needs a trained model where there is none; ``remedy``: what else the person may do."""
    directory = RunDirectory.of(config.run_place)
    with retry_for(FIRST_SECONDS):
        trained = directory.is_trained()
    if not trained:
        raise RequestError(f"{directory.place}: holds no trained model; train first (raysft train CONFIG){remedy}")
