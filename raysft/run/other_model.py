"""Run directories without training: predictions of ``generate.model`` and the evaluation of ``evaluate.model``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from raysft.config import Config, with_overrides
from raysft.config.evaluation_effects import Bearing, bearing_of
from raysft.data.shards.manifest import Manifest
from raysft.errors import RequestError
from raysft.run.ownership import (
    Changes,
    changed_keys,
    describe_changes,
    has_training,
    recorded_config,
    refuse_other_folder,
)
from raysft.run.source_plan import write_unusable
from raysft.storage.json_files import read_jsonl, write_atomically, write_json
from raysft.storage.path import StoragePath
from raysft.storage.run_directory import RunDirectory

OtherVerb = Literal["generate", "evaluate"]
KEYS: Mapping[OtherVerb, str] = {"generate": "generate.model", "evaluate": "evaluate.model"}
"""Verb → the key of the model that it uses instead of a trained one."""
RESULTS: Mapping[OtherVerb, Literal["predict", "eval"]] = {"generate": "predict", "evaluate": "eval"}
"""Verb → the stage whose results it writes."""
MODEL_KEYS = (
    "model.chat_template",
    "model.rope_scaling",
    "model.dtype",
    "model.quantization",
    "model.quantization_type",
    "model.double_quantization",
)
"""Settings of the section ``model`` that change the results of another model; the others concern training only."""


def other_model(config: Config, verb: str) -> str | None:
    """Return the model that a verb uses instead of a trained one; None if there is none."""
    return {"generate": config.generate.model, "evaluate": config.evaluate.model}.get(verb)


def refuse_directory(directory: RunDirectory, config: Config, verb: OtherVerb) -> None:
    """Refuse the directory of a training run or of other results: they would be lost, or taken for those of another model."""
    key, model, place = KEYS[verb], other_model(config, verb), directory.place
    if has_training(directory):
        raise RequestError(
            f"{place}: belongs to a training run, but {key}={model} is a different model; choose another run.name"
        )
    if not directory.config.exists():
        refuse_other_folder(directory)
    for each in KEYS:
        theirs = _with_results(directory, each)
        if theirs is not None and not _is_same(theirs, model):
            raise RequestError(
                f"{place}: has results of {KEYS[each]}={theirs}, but {key}={model} is a different model; choose another "
                "run.name"
            )
        # The directory records one config, for both.
        if theirs is not None and (changes := _changes(directory, config, each, verb)):
            raise RequestError(
                f"{place}: has results of {KEYS[each]}={theirs} with other settings: {describe_changes(changes)}; restore the old "
                "value, or choose another run.name"
            )


def refuse_results(directory: RunDirectory) -> None:
    """Refuse to train in a directory with results of another model, which training would replace."""
    if has_training(directory):
        return
    for each in KEYS:
        if (theirs := _with_results(directory, each)) is not None:
            raise RequestError(
                f"{directory.place}: has results of {KEYS[each]}={theirs}, which a training would replace; choose another run.name"
            )


def _with_results(directory: RunDirectory, verb: OtherVerb) -> str | None:
    """Return the model whose results for a verb the directory holds; None if it holds none."""
    return other_model(recorded_config(directory), verb) if directory.results(RESULTS[verb]).exists() else None


def _is_same(theirs: str, ours: str | None) -> bool:
    """Return True if two names refer to the same model.

    >>> _is_same("models/a", "./models/a/"), _is_same("models/a", "models/b")
    (True, False)
    """
    return ours is not None and (theirs == ours or StoragePath.of(theirs) == StoragePath.of(ours))


def _changes(directory: RunDirectory, config: Config, theirs: OtherVerb, ours: OtherVerb) -> Changes:
    """Return the settings that would change the results that the directory has of one verb, now that another is asked for.

    Predictions record their own settings, and are made again if those differ.
    """
    if theirs == ours == "generate":
        return {}
    changes, section = changed_keys(recorded_config(directory), config), config.data
    sources = [*section.eval, *(section.train if section.holdout else ())]
    draws = bool(section.registry) or any(source.num_samples for source in sources)
    return {
        key: values
        for key, values in changes.items()
        if key in MODEL_KEYS or (theirs == "evaluate" and _decides(key, section.holdout > 0, draws))
    }


def _decides(key: str, holds_out: bool, draws: bool) -> bool:
    """Return True if a key decides which rows ``evaluate.model`` is evaluated on, and what they hold.

    Args:
        key: a key of the config.
        holds_out: True if training data is held out.
        draws: True if records of a source are drawn at random.

    >>> [_decides(key, holds_out=False, draws=False) for key in ("data.eval", "data.train", "data.shuffle", "run.seed")]
    [True, False, False, False]
    >>> _decides("data.train", holds_out=True, draws=False), _decides("run.seed", holds_out=False, draws=True)
    (True, True)
    """
    if key == "run.seed":
        return draws
    if key.startswith("data.train") and not key.startswith("data.train_on_prompt") and not holds_out:
        return False
    of_data = key == "stage" or key.startswith("data.")
    return of_data and bearing_of(key) in (Bearing.SETTING, Bearing.CONTENT)


def begin(
    directory: RunDirectory, config: Config, verb: OtherVerb, plan: Mapping[str, Any], manifests: Sequence[Manifest]
) -> None:
    """Record what is about to run, unless that would replace the record of results that the run may fail to replace."""
    if not directory.results(RESULTS[verb]).exists():
        record(directory, config, verb, plan, manifests)


def record(
    directory: RunDirectory, config: Config, verb: OtherVerb, plan: Mapping[str, Any], manifests: Sequence[Manifest]
) -> None:
    """Write config, plan and rejected records, next to what the other verb wrote about the same model."""
    beside: OtherVerb = "evaluate" if verb == "generate" else "generate"
    planned: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []
    if (theirs := _with_results(directory, beside)) is not None:
        with suppress(OSError, ValueError):
            planned = dict(json.loads(directory.plan.read_text(encoding="utf-8")))
        with suppress(OSError, ValueError):
            kept = list(read_jsonl(directory.rejected))
        config = with_overrides(config, {KEYS[beside]: theirs})
    write_atomically(directory.config, config.to_yaml())
    write_json(directory.plan, {**planned, **plan})
    write_unusable(directory, manifests, kept)
