"""The plans of a sweep's trials, made before the first trial starts.

Rows are planned once for each way in which trials differ in them. Memory is estimated for the trials that need the most: if
they fit, so do the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raysft.cluster.placement import Node
from raysft.config import Config, with_overrides
from raysft.data.prepare import PreparedData
from raysft.errors import RequestError
from raysft.estimate.storage import check_shared
from raysft.run.best_metric import check_best_metric
from raysft.run.inputs import ModelFiles, check_model_files, prepare_data, training_identity, untrained_ends
from raysft.run.needs import with_estimate
from raysft.run.plan import Plan, make_plan

if TYPE_CHECKING:
    from raysft.run.resumption import Resumption

MICROBATCH, RANK = "train.micro_batch_size", "model.lora.rank"
"""Keys with which the memory grows."""
UNRELATED = (
    "run", "tune", "cluster", "generate", "model.lora.alpha", "model.lora.rslora", "model.lora.loraplus_ratio",
    "train.learning_rate", "train.weight_decay", "train.betas", "train.epsilon", "train.max_grad_norm",
    "train.schedule", "train.schedule_options", "train.warmup_ratio", "train.warmup_steps", "train.neftune_alpha",
    "train.nonfinite", "train.eval_at_start", "train.eval_every_steps", "train.eval_every_epochs", "train.eval_delay",
    "train.early_stopping", "train.best_metric", "train.best_mode", "train.compile",
    "train.max_failures", "train.hang_minutes", "train.max_hours", "train.trackers", "train.tracking",
    "scaling.wait_minutes", "scaling.address",
)  # fmt: skip
"""Sections and keys on which neither memory nor storage depends. Trials that differ in any other key are estimated separately."""


@dataclass(frozen=True)
class PlannedRun:
    """A training that may start: its model, its data and its plan."""

    config: Config
    """With the batch size that the data determined."""
    files: ModelFiles
    """Its model."""
    prepared: PreparedData
    plan: Plan
    identity: dict[str, str]
    """Hashes of the model and the data, as ``Cursor`` keeps them."""
    resumption: Resumption | None = None
    """None for a trial, which determines it when it starts."""


def plan_trials(
    trials: Sequence[Config], nodes: Sequence[Node], space: Sequence[str], notify: Callable[[str], None]
) -> list[PlannedRun]:
    """Check every trial's model and memory, and plan each way in which trials differ in model, data or steps.

    Args:
        trials: their configs, fitted to the cluster.
        nodes: the cluster's nodes.
        space: the keys in which trials differ, for messages.
        notify: receives a line for each source that is tokenized.

    Raises:
        RequestError: a trial certainly cannot run; the message shows its values.
    """
    models = [check_model_files(trial, notify) for trial in trials]
    check_shared(trials[0], nodes)
    runs: dict[str, PlannedRun] = {}
    checked: set[tuple[Any, ...]] = set()
    shapes: dict[tuple[str, str], list[_Shaped]] = {}
    for trial, files in zip(trials, models, strict=True):
        rows = _rows_key(trial, files.model)
        if rows not in runs:
            runs[rows] = _planned(trial, files, nodes, notify)
        train, generate = trial.train, trial.generate
        scores = (
            rows,
            train.comparing_key,
            train.best_metric,
            *generate.metrics,
            generate.every_steps,
            generate.max_examples,
        )
        if scores not in checked:
            checked.add(scores)
            check_best_metric(trial, runs[rows].prepared)
        settings = _memory_settings(trial)
        grown = settings.pop(MICROBATCH), settings.pop(RANK)
        shaped = _Shaped(trial, files, *grown)
        shapes.setdefault((rows, json.dumps([files.adapter, settings], sort_keys=True)), []).append(shaped)
    related = [key for key in space if not is_part(key, UNRELATED)]
    for (rows, _), shaped in shapes.items():
        runs[rows] = _with_needs(runs[rows], shaped, nodes, related)
    return list(runs.values())


def memory_key(trial: Config) -> str:
    """Return the settings that the needs of a trial depend on, as text."""
    return json.dumps(_memory_settings(trial), sort_keys=True)


@dataclass(frozen=True)
class _Shaped:
    """One of the trials whose memory differs only by the rows of a microbatch and the rank."""

    config: Config
    files: ModelFiles
    rows: int
    rank: int

    def growth(self, rows_per_worker: int) -> tuple[int, int, bool]:
        """Numbers, each of which takes more memory as it grows. Accumulated gradients are kept in addition to activations."""
        return min(self.rows, rows_per_worker), self.rank, rows_per_worker > self.rows


def _planned(trial: Config, files: ModelFiles, nodes: Sequence[Node], notify: Callable[[str], None]) -> PlannedRun:
    config, prepared = prepare_data(trial, files, notify)
    identity = training_identity(config, files, prepared)
    ends = untrained_ends(config, files, prepared)
    plan = make_plan(
        trial, prepared, nodes, files.adapter, ends, files.commit, files.reference, files.positions, files.hf_config
    )
    return PlannedRun(config, files, prepared, plan, identity)


def _with_needs(run: PlannedRun, trials: Sequence[_Shaped], nodes: Sequence[Node], keys: Sequence[str]) -> PlannedRun:
    """Add to a plan the needs of the trials that need the most.

    Args:
        run: what all of them have in common.
        trials: their memory differs only by microbatch and rank.
        nodes: the cluster's nodes.
        keys: those of the sweep's space that matter.
    """
    first = trials[0]
    commit = first.files.commit
    plan = replace(
        make_plan(
            first.config, run.prepared, nodes, first.files.adapter, model_commit=commit, hf_config=first.files.hf_config
        ),
        warnings=(),
    )
    needs, warnings = list(run.plan.needs), list(run.plan.warnings)
    said: set[str] = set()
    for trial in _largest(trials, plan.rows_per_worker):
        batch = run.prepared.train_rows.row_plan.global_batch_size
        config = with_overrides(trial.config, {"train.global_batch_size": batch})
        dumped = trial.config.model_dump(mode="json")
        named = ", ".join(f"{key}={value_at(dumped, key)}" for key in keys)
        try:
            found = with_estimate(plan, config, trial.files, run.prepared, nodes)
        except RequestError as error:
            raise RequestError(
                f"tune.space: {named}: {error}, or leave such values out" if named else str(error)
            ) from None
        prefix = f"{named}: " if named else ""
        needs += [f"{prefix}{line}" for line in found.needs if line not in said]
        warnings += [f"{prefix}{line}" for line in found.warnings if line not in said]
        said.update((*found.needs, *found.warnings))
    return replace(run, plan=replace(run.plan, needs=tuple(needs), warnings=tuple(warnings)))


def _largest(trials: Iterable[_Shaped], rows_per_worker: int) -> Iterator[_Shaped]:
    """Yield the trials that no other trial exceeds in every respect; of equal ones, the first."""
    found: dict[tuple[int, int, bool], _Shaped] = {}
    for trial in trials:
        found.setdefault(trial.growth(rows_per_worker), trial)
    for growth, trial in found.items():
        if not any(other != growth and all(map(int.__ge__, other, growth)) for other in found):
            yield trial


def _rows_key(trial: Config, model: str) -> str:
    """Return the settings that the rows of a trial depend on, except the seed, as text."""
    prompts, train = (trial.generates, trial.generate.sources), trial.train
    steps = (train.global_batch_size, train.epochs, train.max_steps)
    template = (trial.model.chat_template, trial.model.trust_remote_code)
    content = [trial.stage, model, template, trial.data.model_dump(mode="json"), prompts, steps]
    return json.dumps(content, sort_keys=True)


def _memory_settings(trial: Config) -> dict[str, Any]:
    """Return the settings that memory and storage may depend on, by key, with the microbatch as a number."""
    found = dict(_leaves(trial.model_dump(mode="json")))
    return {key: value for key, value in found.items() if not is_part(key, UNRELATED)} | {
        MICROBATCH: trial.micro_batch_size,
        RANK: trial.model.lora.rank,
    }


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_part(key: str, keys: Iterable[str]) -> bool:
    """Return True if a dotted key is one of some keys or sections, or lies in one of them.

    >>> is_part("run.seed", ["run"]), is_part("train.loss", ["train.los"])
    (True, False)
    """
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def value_at(settings: Any, key: str) -> Any:
    """Return the value of a dotted key; inside lists, its parts are indices.

    >>> value_at({"data": {"train": [{"weight": 2.0}]}}, "data.train.0.weight")
    2.0
    """
    for part in key.split("."):
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    return settings
