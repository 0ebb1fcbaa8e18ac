"""Refuse what cannot run before anything starts: one order for all verbs, cheapest first.

1. Config: what the verb cannot do with it.
2. Run directory: writable, unused by others, and of the same config.
3. Packages: trackers and metrics.
4. Cluster: joined, with room for workers and engines.
5. Model: files, architecture, adapters, and what generation needs of it.
6. Data: tokenized into the cache; the model embeds every token, and the run can resume with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysft.cluster.connect import alive_nodes, cluster
from raysft.cluster.placement import Node
from raysft.config import Config, with_overrides
from raysft.data.prepare import PreparedData, prepare, prepare_prompts
from raysft.data.shards.manifest import Manifest
from raysft.data.tokenization.tokenizer import load_once
from raysft.errors import RequestError
from raysft.models.weight_files import check_weights, embedding_rows
from raysft.run.ownership import (
    Changes,
    check_ownership,
    ensure_writable,
    exclusive_access,
    refuse_training,
    with_recorded_batch_size,
)
from raysft.run.plan import Plan, make_plan
from raysft.run.resources import check_resources
from raysft.storage.local_cache import local_copy, model_copy
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only, synced
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.trackers import missing_tracker

if TYPE_CHECKING:
    from raysft.run.resumption import Resumption

Verb = Literal["run", "check", "prepare", "train", "evaluate", "generate", "tune"]
Place = Callable[[Config, Sequence[Node]], Config]
"""Returns the config as it fits into the cluster, or raises RequestError."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that can be trained as the config says."""

    model: str
    """Folder, URI or hub id of the model to start from, with earlier adapters merged."""
    adapter: str | None
    """Folder of the adapter to continue from."""
    embedding_rows: int | None
    """Number of tokens that it has embeddings for; None if it does not say."""


@dataclass(frozen=True)
class PlannedRun:
    """A training that may start: its model, its data and its plan."""

    config: Config
    """With the batch size that the data decided."""
    model: str
    """Folder, URI or hub id of the model to start from."""
    adapter: str | None
    """Folder of the adapter to continue from."""
    prepared: PreparedData
    plan: Plan
    identity: dict[str, str]
    """Hashes of the model and the data, as ``Cursor`` keeps them."""
    resumption: Resumption | None = None
    """None for a trial, which finds out when it starts."""


@dataclass(frozen=True)
class PlannedPrompts:
    """Prompts for any model, ``generate.model``."""

    model: str
    """Folder, URI or hub id."""
    manifests: list[Manifest]
    tokenizer: Any
    embedding_rows: int | None
    """Number of tokens that the model has embeddings for; None if it does not say."""


@dataclass(frozen=True)
class Preflight:
    """A request that nothing speaks against, with what the checks found for the next stage."""

    directory: RunDirectory
    terminal: Terminal
    nodes: Sequence[Node]
    configs: tuple[Config, ...]
    """The config of each run, as it fits into the cluster."""
    runs: tuple[PlannedRun, ...] = ()
    """One run; of trials one for each way in which model or data differ."""
    prompts: PlannedPrompts | None = None
    """For ``generate`` with ``generate.model``."""


@contextmanager
def preflight(
    config: Config,
    verb: Verb,
    allow_changed: bool = False,
    trials: Sequence[Config] = (),
    place: Place | None = None,
) -> Iterator[Preflight]:
    """Check a request in the order of this module, and keep run directory and cluster open for the block.

    Until the block writes, nothing but the cache is written to.

    Args:
        config: the request.
        verb: what is to be done with it.
        allow_changed: accept changed settings and data in a run that resumes.
        trials: for ``tune``, the config of each trial.
        place: fits a run into the cluster. Default: ``check_resources``.

    Raises:
        RequestError: the request cannot be carried out.
    """
    runs, terminal = list(trials) or [config], Terminal()
    predicts = verb == "generate" and config.generate.model is not None
    for run in runs:
        check_verb(run, verb)
    with _open_directory(config, verb, terminal) as directory:
        changes: Changes = {}
        if predicts:
            refuse_training(directory, config)
        else:
            changes = check_ownership(directory, config, allow_changed)
        for trial in trials:
            with open_read_only(trial.run_place, terminal.line) as existing:
                check_ownership(existing, trial)
        for run in runs:
            check_packages(run, trains=not predicts)
        with cluster(config) as nodes:
            if not predicts:
                runs = [(place or _placed)(run, nodes) for run in runs]
            for run in runs:
                check_engines(run)
            ready = Preflight(directory, terminal, nodes, tuple(runs))
            if predicts:
                yield replace(ready, prompts=_plan_prompts(config, terminal.line))
            elif trials:
                yield replace(ready, runs=tuple(_plan_trials(runs, nodes, terminal.line)))
            else:
                planned = _plan_run(runs[0], directory, nodes, changes, allow_changed, terminal.line)
                yield replace(ready, runs=(planned,))


def check_verb(config: Config, verb: Verb) -> None:
    """Refuse a config that the verb can do nothing with."""
    model = config.generate.model
    if verb in ("run", "check", "tune") and model is not None:
        raise RequestError(
            f"raysft {verb} generates with the model that it trains, but generate.model={model}; remove generate.model, or use "
            "raysft generate"
        )
    if verb == "evaluate" and not (config.data.eval or config.data.holdout):
        raise RequestError("there is nothing to evaluate on; set data.eval, or data.holdout above 0")
    if verb == "generate" and config.stage != "sft":
        raise RequestError(f"raysft generate needs conversations, but stage={config.stage}; set stage=sft")
    if verb == "generate" and not config.generate.enabled:
        raise RequestError("raysft generate needs generate.enabled, but generate.enabled=False; set it to true")
    if verb == "generate" and not config.generates:
        raise RequestError("there is nothing to generate for; set data.eval, data.holdout or generate.sources")


@contextmanager
def _open_directory(config: Config, verb: Verb, terminal: Terminal) -> Iterator[RunDirectory]:
    """Open the run directory: for a check to read, else to work in, where all but a sweep work alone."""
    if verb == "evaluate":
        check_trained(config)
    if verb == "generate" and config.generate.model is None:
        check_trained(config, ", or set generate.model to any model")
    ensure_writable(config)
    if verb == "check":
        with open_read_only(config.run_place, terminal.line) as directory:
            yield directory
        return
    directory = RunDirectory.of(config.run_place)
    if verb == "tune":  # each trial locks its own directory
        with synced(directory, terminal.line):
            yield directory
        return
    with exclusive_access(directory, terminal), synced(directory, terminal.line):
        yield directory


def check_trained(config: Config, remedy: str = "") -> None:
    """Refuse a run directory without a trained model; ``remedy`` says what else to do than to train."""
    directory = RunDirectory.of(config.run_place)
    with retry_for(FIRST_SECONDS):
        trained = directory.is_trained()
    if not trained:
        raise RequestError(f"{directory.place}: holds no trained model; train first (raysft train CONFIG){remedy}")


def check_packages(config: Config, trains: bool = True) -> None:
    """Refuse trackers whose package is missing, and metrics that cannot be loaded."""
    if trains and (missing := missing_tracker(config.train.trackers)):
        raise RequestError(
            f"train.trackers={config.train.trackers} needs the package {missing}, which is not installed; "
            f"pip install 'raysft[{missing}]', or remove it from train.trackers"
        )
    if config.generates:
        from raysft.generate import metrics

        metrics.check(config)


def check_engines(config: Config) -> None:
    """Refuse an engine that is not installed or that the cluster cannot place."""
    if not config.generates:
        return
    from raysft.generate.engine_pool import size_pool
    from raysft.generate.engines import check_engine

    check_engine(config)
    size_pool(config, alive_nodes(), batches=config.generate.num_actors or 1)


def _placed(config: Config, nodes: Sequence[Node]) -> Config:
    check_resources(config, nodes)
    return config


def _plan_run(
    asked: Config,
    directory: RunDirectory,
    nodes: Sequence[Node],
    changes: Changes,
    allow_changed: bool,
    notify: Callable[[str], None],
) -> PlannedRun:
    from raysft.run.resumption import check_resumption

    config = with_recorded_batch_size(directory, asked)
    config, model, adapter, prepared = read_inputs(config, notify)
    identity = training_identity(model, adapter, prepared)
    resumption = check_resumption(directory, config, prepared.train_rows, identity, changes, allow_changed)
    prepared = replace(prepared, train_rows=resumption.rows)
    plan = make_plan(asked, prepared, nodes, adapter)
    return PlannedRun(config, model, adapter, prepared, plan, identity, resumption)


def _plan_trials(
    trials: Sequence[Config], nodes: Sequence[Node], notify: Callable[[str], None]
) -> Iterator[PlannedRun]:
    """Check every trial's model, and make the data of each way in which trials differ in it."""
    models = [check_model_files(trial, notify) for trial in trials]
    planned: set[str] = set()
    for trial, files in zip(trials, models, strict=True):
        data, prompts = trial.data.model_dump(mode="json"), (trial.generates, trial.generate.sources)
        key = json.dumps([trial.stage, trial.model.model_dump(mode="json"), data, prompts], sort_keys=True)
        if key in planned:
            continue
        planned.add(key)
        config, prepared = prepare_data(trial, files, notify)
        identity = training_identity(files.model, files.adapter, prepared)
        plan = make_plan(trial, prepared, nodes, files.adapter)
        yield PlannedRun(config, files.model, files.adapter, prepared, plan, identity)


def read_inputs(config: Config, notify: Callable[[str], None]) -> tuple[Config, str, str | None, PreparedData]:
    """Return the config with what the data decided, the model, the adapter to continue from, and the data.

    Raises:
        RequestError: they cannot be used as asked.
    """
    files = check_model_files(config, notify)
    config, prepared = prepare_data(config, files, notify)
    return config, files.model, files.adapter, prepared


def check_model_files(config: Config, notify: Callable[[str], None]) -> ModelFiles:
    """Find the model, merge adapters into it, and refuse what cannot be trained or generated with."""
    from raysft.models.adapters import find_adapter
    from raysft.models.resolve import find_model
    from raysft.train.check_model import check_model

    model = find_model(config.model.path, config.cache_directory, notify)
    hf_config = check_model(config, model, notify)
    check_generation(config, model)
    model, adapter = find_adapter(config, model, notify)
    return ModelFiles(
        model, adapter, embedding_rows(Path(local_copy(model)), hf_config, f"model.path={config.model.path}")
    )


def check_generation(config: Config, model: str) -> None:
    """Refuse settings of ``generate`` that the model does not support."""
    if config.generates:
        from raysft.generate.engines import check_suitable

        check_suitable(config, model)


def prepare_data(config: Config, files: ModelFiles, notify: Callable[[str], None]) -> tuple[Config, PreparedData]:
    """Tokenize the data, and return the config with the batch size that it decides."""
    from raysft.train.deepspeed_config import deepspeed_settings

    prepared = prepare(config, files.model, notify)
    manifests = (*prepared.train, *prepared.eval, *prepared.prompts)
    tokenizer = load_once(files.model, config.model.runs_code)
    largest = (manifest.largest_token for manifest in manifests)
    check_tokens(largest, files.embedding_rows, tokenizer, f"model.path={config.model.path}")
    if config.train.global_batch_size == "auto":
        config = with_overrides(config, {"train.global_batch_size": prepared.train_rows.row_plan.global_batch_size})
        deepspeed_settings(config, config.scaling.most_workers)
    return config, prepared


def check_tokens(used: Iterable[tuple[int, str]], rows: int | None, tokenizer: Any, named: str) -> None:
    """Refuse text whose tokens the model has no embeddings for: somebody may have added tokens to the tokenizer alone.

    Args:
        used: token ids, and where each of them occurs.
        rows: number of tokens that the model has embeddings for; None if it does not say.
        tokenizer: the tokenizer that made them.
        named: the model as messages name it, ``model.path=PATH``.
    """
    for token, where in used:
        if rows is not None and token >= rows:
            raise RequestError(
                f"{named}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for {rows}; {where} holds token "
                f"{token} ({tokenizer.convert_ids_to_tokens(token)!r}); put the tokenizer that belongs to the model into its "
                f"folder, or resize the model's embeddings to {len(tokenizer)} (resize_token_embeddings) and save it"
            )


def training_identity(model: str, adapter: str | None, prepared: PreparedData) -> dict[str, str]:
    """Hashes of what a training is of, by name, as ``Cursor`` keeps them."""
    from raysft.models.fingerprint import model_fingerprint
    from raysft.train.checkpoint.cursor import EVALUATION

    identity = {"the model": model_fingerprint(model)}
    if adapter:
        identity["the adapter"] = model_fingerprint(adapter)
    identity |= {f"the data of source {manifest.name!r}": manifest.key for manifest in prepared.train}
    return identity | {EVALUATION: " ".join(manifest.key for manifest in prepared.eval)}


def _plan_prompts(config: Config, notify: Callable[[str], None]) -> PlannedPrompts:
    """Check ``generate.model``, and tokenize the prompts with its tokenizer."""
    from raysft.models.adapter_files import adapter_base
    from raysft.models.architecture import read_hf_config
    from raysft.models.quantization import check_method, method_of, quantization_config
    from raysft.models.remote_code import code_name, runs_code
    from raysft.models.resolve import find_model
    from raysft.models.tokenizer import tokenizer_folder

    key = "generate.model"
    model = find_model(config.generate.model or "", config.cache_directory, notify, key, accept_adapter=True)
    folder, named = model_copy(model), f"{key}={model}"
    base = adapter_base(folder)
    check_weights(folder, named)
    hf_config = read_hf_config(config, str(base or folder), code_name(config, folder), notify, key)
    if method := method_of(hf_config):
        check_method(named, method, config)
    quantization_config(config)
    check_generation(config, model)
    rows = embedding_rows(base or folder, hf_config, named)
    tokenizer_path, trusted = str(tokenizer_folder(folder)), runs_code(config, folder)
    manifests = prepare_prompts(config, tokenizer_path, trusted, notify)
    return PlannedPrompts(model, manifests, load_once(tokenizer_path, trusted), rows)
