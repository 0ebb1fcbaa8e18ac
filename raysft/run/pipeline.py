"""The story of a run on one page: data → train → evaluate → generate → report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from raysft.cluster.connect import cluster
from raysft.cluster.placement import Node
from raysft.config import Config, load, masked, parse, with_overrides
from raysft.data.prepare import PreparedData, prepare
from raysft.data.shards.manifest import write_prompts
from raysft.data.tokenization.tokenizer import load_once
from raysft.errors import RequestError, StorageFailed
from raysft.models.weight_files import embedding_rows
from raysft.run.ownership import Changed, belongs_to, ensure_writable, exclusive_access, settled
from raysft.run.plan import Plan, make_plan
from raysft.run.predict import predict
from raysft.run.preflight import (
    check_engines,
    check_generation,
    check_metrics,
    check_tokens,
    check_trackers,
    check_trained,
    refuse_other_model,
)
from raysft.run.resources import check_resources
from raysft.storage.json_files import flat, write_atomically, write_json, write_jsonl
from raysft.storage.local_cache import local_copy
from raysft.storage.path import StoragePath
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only, synced
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.trackers import open_trackers
from raysft.telemetry.train_log import TrainLog, evaluation_line


def run_sft(config: Config | Mapping[str, Any] | str | Path, callbacks: Sequence[Any] | None = None) -> dict[str, Any]:
    """Supervised fine-tuning, from data to report.

    Args:
        config: a config, a mapping in its form, or the path of a YAML file; ``stage`` must be sft.
        callbacks: objects with any of ``on_step(record)``, ``on_evaluate(results)``, ``on_checkpoint(cursor)`` and
            ``on_end(results)``; called in this process with what the first worker logs.

    Returns:
        All results, as in ``all_results.json``.

    Raises:
        RequestError: the request cannot be carried out as it is.
        RunFailed: the run failed.
    """
    return run(_as_config(config, "sft"), callbacks or ())


def run_pt(config: Config | Mapping[str, Any] | str | Path, callbacks: Sequence[Any] | None = None) -> dict[str, Any]:
    """Continued pre-training on raw text, from data to report; arguments and results are those of ``run_sft``."""
    return run(_as_config(config, "pt"), callbacks or ())


def run(config: Config, callbacks: Sequence[Any] = (), allow_changed: bool = False) -> dict[str, Any]:
    """Data → train → evaluate → generate → report; what is done already is not done again.

    Args:
        config: what to do.
        callbacks: as ``run_sft`` takes them.
        allow_changed: go on with a run that another config, model or data began; it is recorded.
    """
    refuse_other_model(config)
    with open_run(config, allow_changed) as context:
        train_model(context, callbacks)
        generate_predictions(context)
        print_report(context.directory)
    return context.directory.read_results("all")


def check(config: Config) -> Plan:
    """Say what a run will do. Model and data are really opened; only the cache is written.

    Raises:
        RequestError: it could not run.
    """
    refuse_other_model(config)
    with open_read_only(config.run_place, Terminal().line) as directory:
        belongs_to(directory, config)
        begun_with = settled(directory, config)
    check_metrics(config)
    check_trackers(config)
    with cluster(config) as nodes:
        check_resources(config, nodes)
        check_engines(config)
        _, _, adapter, prepared = _prepared(begun_with)
        plan = make_plan(config, prepared, nodes, adapter)
    terminal = Terminal()
    for line in plan.lines():
        terminal.line(line)
    terminal.line(f"run directory: {config.run_place}")
    return plan


def show(config: Config, rows: int, page: Path | None = None) -> None:
    """Print the first packed rows of the training data and the lengths of its examples, or write them as an HTML page."""
    from raysft.data.preview import LengthSummary, decode_rows, print_rows, write_page

    with cluster(config):
        _, model, _, prepared = _prepared(config)
    shown = list(decode_rows(prepared.train_rows, model, rows, config.model.runs_code))
    lengths = LengthSummary.of(prepared.train_rows, prepared.train)
    if page is None:
        print_rows(shown, lengths)
        return
    try:
        write_page(shown, lengths, page)
    except OSError as error:
        raise RequestError(f"--html {page}: cannot be written ({error.strerror}); choose another file") from None
    Terminal().line(f"written: {page}")


def prepare_data(config: Config) -> None:
    """Tokenize the data into the cache, and plan."""
    with open_run(config) as context:
        for manifest in (*context.prepared.train, *context.prepared.eval):
            context.terminal.line(f"{'reused' if manifest.reused else 'written'}: {manifest.directory}")


def train(config: Config, callbacks: Sequence[Any] = (), allow_changed: bool = False) -> None:
    """Train and evaluate."""
    with open_run(config, allow_changed) as context:
        train_model(context, callbacks)


def evaluate(config: Config) -> None:
    """Evaluate the trained model in a job of its own."""
    check_trained(config)
    with open_run(config) as context:
        evaluate_model(context)


def generate(config: Config) -> None:
    """Generate predictions and score them, with the trained model or with ``generate.model``."""
    if config.stage != "sft":
        raise RequestError(f"stage={config.stage!r} has no generation; it belongs to stage: sft")
    if not config.generate.enabled:
        raise RequestError("generate.enabled=False; set it to true to generate")
    if not config.generates:
        raise RequestError("there is nothing to generate for; name data.eval or generate.sources")
    if config.generate.model is not None:
        print_report(predict(config))
        return
    check_trained(config, ", or name any model in generate.model")
    with open_run(config) as context:
        generate_predictions(context)
        print_report(context.directory)


def export(place: StoragePath, output: Path) -> None:
    """Write the trained model of a run directory as one Hugging Face model, adapters merged."""
    from raysft.models.adapters import merge

    with retry_for(FIRST_SECONDS):
        there = (place / "config.yaml").exists()
    if not there:
        raise RequestError(f"{place}: is no run directory (it holds no config.yaml)")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"--output {output}: exists and is not an empty folder; choose another")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--output {output}: cannot be made ({error.strerror}); choose another folder") from None
    model = RunDirectory.of(place).model
    if not place.local and not RunDirectory.of(place).is_trained():
        raise RequestError(f"{model}: holds no trained model; train first (raysft train CONFIG)")
    try:
        trusted = parse(yaml.safe_load((place / "config.yaml").read_text())).model.runs_code
    except (RequestError, TypeError, ValueError, yaml.YAMLError):
        trusted = False  # a config of another version; the model is exported all the same
    merge(Path(local_copy(model.location)), output, trusted)
    Terminal().line(f"exported: {output}")


def print_report(directory: RunDirectory) -> None:
    """Plots, model card, and what was learnt."""
    from raysft.report import report

    print(report(directory))


@dataclass(frozen=True)
class RunContext:
    """A run that may begin: its data is prepared and its directory is its own."""

    config: Config
    directory: RunDirectory
    terminal: Terminal
    model: str
    """Folder or hub id of the model to start from."""
    adapter: str | None
    """Folder of the adapter to go on with."""
    prepared: PreparedData
    identity: dict[str, str]
    """What the training is of, as ``Cursor`` has it."""


@contextmanager
def open_run(config: Config, allow_changed: bool = False) -> Iterator[RunContext]:
    """Join the cluster, check the request against it, find the model, tokenize the data and plan.

    The run directory is made, and what is in it is touched, only when all of that is known to be right.
    """
    directory, terminal = RunDirectory.of(config.run_place), Terminal()
    ensure_writable(config)
    with exclusive_access(directory, terminal), synced(directory, terminal.line):
        changed = belongs_to(directory, config, allow_changed)
        check_metrics(config)
        check_trackers(config)
        with cluster(config) as nodes:
            yield _open_run(config, directory, terminal, nodes, changed, allow_changed)


def _open_run(
    config: Config,
    directory: RunDirectory,
    terminal: Terminal,
    nodes: Sequence[Node],
    changed: Changed,
    allow_changed: bool,
) -> RunContext:
    from raysft.run.resumption import SCHEDULE, check_resumption, record_changes

    check_resources(config, nodes)
    check_engines(config)
    asked, config = config, settled(directory, config)
    config, model, adapter, prepared = _prepared(config)
    identity = _identity(model, adapter, prepared)
    it = check_resumption(directory, config, prepared.train_rows, identity, changed, allow_changed)
    prepared = replace(prepared, train_rows=it.rows)
    plan = make_plan(asked, prepared, nodes, adapter)
    if it.changed:
        terminal.line(record_changes(directory, it))
    # Before the config: who is killed in between finds the config that the run was begun with, and asks for the change again.
    write_json(directory.plan, {**plan.as_dict(), SCHEDULE: it.scheduled.to_dict()})
    write_atomically(directory.config, config.to_yaml())
    manifests = [*prepared.train, *prepared.eval]
    write_jsonl(directory.rejected, [flat(item) for each in manifests for item in (*each.rejected, *each.dropped)])
    for line in plan.lines():
        terminal.line(line)
    return RunContext(config, directory, terminal, model, adapter, prepared, identity)


def train_model(context: RunContext, callbacks: Sequence[Any] = ()) -> None:
    """Train and evaluate; results go to ``train_results.json`` and ``eval_results.json``."""
    from raysft.train.checkpoint.format import remove_passing

    if context.directory.is_done():
        context.terminal.line(
            f"train: {context.directory.place} is trained already (another run.name starts a new run)"
        )
    else:
        _train(context, callbacks)
    with suppress(StorageFailed), retry_for(0):
        remove_passing(context.directory.checkpoints)


def _train(context: RunContext, callbacks: Sequence[Any]) -> None:
    from raysft.train import launch

    trackers = _trackers(context)
    train_log = TrainLog(context.directory.trainer_log, context.terminal, [*trackers, *callbacks])
    try:
        results = launch.train(_job(context), train_log)
    finally:
        context.terminal.close()
        for tracker in trackers:
            tracker.close()
    if results["eval"]:
        context.directory.write_results("eval", results["eval"])
    efficiency = {"packing_efficiency": round(context.prepared.train_rows.row_plan.packing_efficiency, 6)}
    context.directory.write_results(
        "train", {**results["train"], **train_log.results(), **efficiency, **train_log.timings}
    )


def _trackers(context: RunContext) -> list[Any]:
    names, shown = context.config.train.trackers, context.config.model_dump(mode="json")
    try:
        # A library may repeat what its server's address in the environment holds.
        return open_trackers(names, context.directory.path, shown, lambda line: context.terminal.line(masked(line)))
    except RuntimeError as error:
        raise RequestError(f"train.trackers: {masked(str(error))}; set it up, or take it out") from None


def evaluate_model(context: RunContext) -> None:
    """Evaluate the trained model on all evaluation sets; results go to ``eval_results.json``."""
    if not context.prepared.eval:
        raise RequestError("there is nothing to evaluate on; name data.eval or set data.holdout above 0")
    from raysft.train import launch

    results = launch.evaluate(_job(context), lambda event: None)
    context.directory.write_results("eval", results["eval"])
    context.terminal.line(evaluation_line(results["eval"]))


def generate_predictions(context: RunContext) -> None:
    """Generate for ``generate.sources`` with the model before training and the trained one, and score both."""
    config, directory = context.config, context.directory
    if not context.prepared.prompts:
        return
    from raysft.generate.batch_inference import generate as infer
    from raysft.generate.metrics import write_metrics

    if not write_prompts(
        context.prepared.prompts, directory.prompts, config.generate.max_examples, context.prepared.end_tokens
    ):
        context.terminal.line("generate: no example has a prompt (ready tokens have none); nothing is generated")
        return
    rows = []
    if not config.generate.compare_base:
        directory.base_predictions.unlink(missing_ok=True)  # those of an earlier call were perhaps made otherwise
    else:
        context.terminal.line("generating with the model before training")
        rows += infer(
            config,
            model=context.adapter or context.model,
            prompts=directory.prompts,
            output=directory.base_predictions,
            role="base",
        )
    context.terminal.line("generating with the trained model")
    rows += infer(config, model=directory.model.location, prompts=directory.prompts, output=directory.predictions)
    write_metrics(directory, rows)


def _prepared(config: Config) -> tuple[Config, str, str | None, PreparedData]:
    """The config with what the data decided, the model, the adapter to go on with, and the data.

    Raises:
        RequestError: they cannot be used as asked.
    """
    from raysft.models.adapters import find_adapter
    from raysft.models.resolve import find_model
    from raysft.train.check_model import check_model
    from raysft.train.deepspeed_config import deepspeed_settings

    ensure_writable(config)
    notify = Terminal().line
    model = find_model(config.model.path, config.cache_directory, notify)
    hf_config = check_model(config, model, notify)
    check_generation(config, model)
    model, adapter = find_adapter(config, model, notify)
    prepared = prepare(config, model, notify)
    named, manifests = f"model.path={config.model.path}", (*prepared.train, *prepared.eval, *prepared.prompts)
    rows = embedding_rows(Path(local_copy(model)), hf_config, named)
    check_tokens((each.largest_token for each in manifests), rows, load_once(model, config.model.runs_code), named)
    if config.train.global_batch_size == "auto":
        config = with_overrides(config, {"train.global_batch_size": prepared.train_rows.row_plan.global_batch_size})
        deepspeed_settings(config, config.scaling.most_workers)
    return config, model, adapter, prepared


def _identity(model: str, adapter: str | None, prepared: PreparedData) -> dict[str, str]:
    from raysft.models.fingerprint import model_fingerprint
    from raysft.train.checkpoint.cursor import EVALUATION

    identity = {"the model": model_fingerprint(model)} | (
        {"the adapter": model_fingerprint(adapter)} if adapter else {}
    )
    identity |= {f"the data of source {each.name!r}": each.key for each in prepared.train}
    return identity | {EVALUATION: " ".join(each.key for each in prepared.eval)}


def _job(context: RunContext) -> Any:
    from raysft.train.job import TrainJob

    return TrainJob(
        config=context.config,
        model=context.model,
        run=context.directory,
        adapter=context.adapter,
        train_rows=context.prepared.train_rows,
        eval_rows=context.prepared.eval_rows,
        identity=context.identity,
        ends=context.prepared.end_tokens,
    )


def _as_config(config: Config | Mapping[str, Any] | str | Path, stage: str) -> Config:
    if isinstance(config, str | Path):
        config = load(config)
    elif not isinstance(config, Config):
        config = parse(dict(config))
    if config.stage != stage:
        raise RequestError(
            f"stage={config.stage!r} is not what run_{stage} does; use run_{config.stage}, or set stage: {stage}"
        )
    return config
