"""Run directories without a training: predictions of ``generate.model`` and the evaluation of ``evaluate.model``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from raysft.config import Config, with_overrides
from raysft.data.shards.manifest import Manifest
from raysft.errors import RequestError
from raysft.run.ownership import has_training, recorded_config, refuse_other_folder
from raysft.run.source_plan import write_unusable
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.run_directory import RunDirectory

OtherVerb = Literal["generate", "evaluate"]
KEYS: Mapping[OtherVerb, str] = {"generate": "generate.model", "evaluate": "evaluate.model"}
"""Verb → the key of the model that it takes in place of a trained one."""
RESULTS: Mapping[OtherVerb, Literal["predict", "eval"]] = {"generate": "predict", "evaluate": "eval"}
"""Verb → the stage whose results it writes."""


def other_model(config: Config, verb: str) -> str | None:
    """Return the model that a verb takes in place of a trained one; None if there is none."""
    return {"generate": config.generate.model, "evaluate": config.evaluate.model}.get(verb)


def refuse_directory(directory: RunDirectory, config: Config, verb: OtherVerb) -> None:
    """Refuse the directory of a training, or of another model: results would pass for those of that model."""
    key, model = KEYS[verb], other_model(config, verb)
    if has_training(directory):
        raise RequestError(
            f"{directory.place}: belongs to a training, but {key}={model} is another model; choose another run.name"
        )
    if not directory.config.exists():
        refuse_other_folder(directory)
    beside, theirs = _beside(directory, verb)
    if theirs not in (None, model):
        raise RequestError(
            f"{directory.place}: has results of {KEYS[beside]}={theirs}, but {key}={model} is another model; "
            "choose another run.name"
        )


def _beside(directory: RunDirectory, verb: OtherVerb) -> tuple[OtherVerb, str | None]:
    """Return the other verb, and the model whose results of it the directory has; None without results."""
    beside: OtherVerb = "evaluate" if verb == "generate" else "generate"
    with suppress(RequestError, OSError):
        if directory.results(RESULTS[beside]).exists():
            return beside, other_model(recorded_config(directory), beside)
    return beside, None


def begin(
    directory: RunDirectory, config: Config, verb: OtherVerb, plan: Mapping[str, Any], manifests: Sequence[Manifest]
) -> None:
    """Write config, plan and rejected records, beside what the other verb has written about the same model."""
    beside, theirs = _beside(directory, verb)
    recorded: dict[str, Any] = {}
    if theirs is not None:
        with suppress(OSError, ValueError):
            recorded = dict(json.loads(directory.plan.read_text(encoding="utf-8")))
        config = with_overrides(config, {KEYS[beside]: theirs})
    write_atomically(directory.config, config.to_yaml())
    write_json(directory.plan, {**recorded, **plan})
    write_unusable(directory, manifests)
