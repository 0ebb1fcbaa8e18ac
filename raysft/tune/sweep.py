"""A sweep: whole runs over a grid of config values, through Ray Tune."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.cluster.connect import cluster
from raysft.cluster.placement import Node
from raysft.config import Config, with_overrides
from raysft.errors import RequestError, RunFailed
from raysft.run.ownership import belongs_to
from raysft.run.pipeline import run
from raysft.run.plan import make_plan
from raysft.run.preflight import refuse_other_model
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only, synced
from raysft.telemetry.terminal import Terminal
from raysft.tune.trials import TRIAL_CPUS, Trial, check_metric, combinations, concurrent_trials, with_engines


def tune(config: Config) -> Config:
    """Run every combination of ``tune.space`` and write the best config as ``best.yaml``.

    All trials share the tokenized shards and the converted model, which are made before the first of them starts. Started
    again, a sweep runs only what is missing.

    Args:
        config: what all trials have in common, with ``tune.space``.

    Returns:
        The best trial's config, ready to run by itself.

    Raises:
        RequestError: the space is empty or names unknown keys, or the cluster cannot place a trial.
        RunFailed: a trial failed; what the others gave is written all the same.
    """
    trials = combinations(config)
    for trial in trials:
        refuse_other_model(trial.config)
    directory = RunDirectory.of(config.run_place)
    terminal = Terminal()
    for trial in trials:
        check_metric(trial.config, config.tune.metric)
        with open_read_only(trial.config.run_place, terminal.line) as there:
            belongs_to(there, trial.config)
    with synced(directory, terminal.line):
        belongs_to(directory, config)
        return _tuned(config, trials, directory, terminal)


def _tuned(config: Config, trials: Sequence[Trial], directory: RunDirectory, terminal: Terminal) -> Config:
    with cluster(config) as nodes:
        trials = [with_engines(trial, nodes) for trial in trials]
        concurrent = min(concurrent_trials(trial.config, nodes) for trial in trials)
        concurrent = min(concurrent, len(trials), config.tune.max_concurrent or concurrent)
        _prepare(trials, nodes, terminal)
        terminal.line(
            f"tune: {len(trials)} trials, {concurrent} at a time, best by {config.tune.mode} {config.tune.metric}; "
            f"their runs: {config.run_place / 'trials'}"
        )
        directory.path.mkdir(parents=True, exist_ok=True)
        write_atomically(directory.config, config.to_yaml())
        outcomes = _fit(config, trials, concurrent)
    return _conclude(config, trials, outcomes, terminal)


def _prepare(trials: Sequence[Trial], nodes: Sequence[Node], terminal: Terminal) -> None:
    """Convert models and tokenize data, once for each way in which they differ between trials."""
    from raysft.data.prepare import prepare
    from raysft.models.remote_code import check_code
    from raysft.models.resolve import find_model

    prepared = set()
    for trial in trials:
        config = trial.config
        key = json.dumps([config.stage, config.model.path, config.data.model_dump(mode="json")], sort_keys=True)
        if key in prepared:
            continue
        prepared.add(key)
        model = find_model(config.model.path, config.cache_directory, terminal.line)
        check_code(config, model, terminal.line)
        for line in make_plan(config, prepare(config, model), nodes).lines():
            terminal.line(line)


def _fit(config: Config, trials: Sequence[Trial], concurrent: int) -> dict[str, Any]:
    """Run the trials; gives the results or the error of each by its name, and nothing of one that was interrupted."""
    import ray.tune

    folder = config.run_directory / "tune"
    shutil.rmtree(folder, ignore_errors=True)  # Tune's own records of an earlier call: the runs are elsewhere
    progress, stop = _watchers(config.tune.metric, {trial.name: str(trial) for trial in trials})
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(_trainable(trials), {"cpu": TRIAL_CPUS}),
        # A name, and not the values: Tune puts placeholders for lists and mappings, and takes some strings for code.
        param_space={"trial": ray.tune.grid_search([trial.name for trial in trials])},
        tune_config=ray.tune.TuneConfig(
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda it: it.config["trial"],
            trial_dirname_creator=lambda it: it.config["trial"],
        ),
        run_config=ray.tune.RunConfig(
            name=folder.name, storage_path=str(folder.parent), verbose=0, callbacks=[progress], stop=stop
        ),
    )
    with _quiet_tune():
        grid = tuner.fit()
    outcomes: dict[str, Any] = {}
    for result in grid:
        if result.error or "run_name" in (result.metrics or {}):
            outcomes[Path(result.path).name] = _reason(result.error) if result.error else result.metrics
    return outcomes


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its tables, tracebacks and advice: each trial has a line of ours, and what fails is said once."""
    logger, switch = logging.getLogger("ray.tune"), "RAY_AIR_NEW_OUTPUT"
    level, before = logger.level, os.environ.get(switch)
    logger.setLevel(logging.CRITICAL)
    os.environ[switch] = "0"  # the new output prints its tables at verbose=0 too, and has no other switch
    try:
        yield
    finally:
        logger.setLevel(level)
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def _trainable(trials: Sequence[Trial]) -> Callable[[dict[str, Any]], None]:
    configs = {trial.name: trial.config.model_dump(mode="json") for trial in trials}
    home = os.getcwd()

    def trial(values: dict[str, Any]) -> None:
        # Tune moves a trial into a folder of its own, where relative paths of the config mean nothing.
        with contextlib.suppress(FileNotFoundError):
            os.chdir(home)
        name = values["trial"]
        ray.tune.report({**run(Config.model_validate(configs[name])), "run_name": name})

    import ray.tune

    return trial


def _watchers(metric: str, named: Mapping[str, str]) -> tuple[Any, Any]:
    """What Tune tells while it runs: a callback that prints a line for each trial, and a stopper.

    Tune pickles both, so they hold no terminal.
    """
    import ray.tune
    import ray.tune.stopper

    class Progress(ray.tune.Callback):
        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            Terminal().line(f"started: {named[str(trial)]}")

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            value = (trial.last_result or {}).get(metric)
            if value is not None:
                Terminal().line(f"done: {named[str(trial)]} | {metric} {_number(value)}")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            reason = _reason(trial.get_pickled_error() or trial.get_error())
            Terminal().line(f"failed: {named[str(trial)]} | {reason}")

    class WithoutMetric(ray.tune.stopper.Stopper):
        """Ends the sweep with the first trial that does not give the metric: the others would not either."""

        def __init__(self) -> None:
            self.found = False

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.found = self.found or ("run_name" in result and metric not in result)
            return False

        def stop_all(self) -> bool:
            return self.found

    return Progress(), WithoutMetric()


def _reason(error: Any) -> Exception:
    """What a trial failed of, as an error of ours with one line."""
    while getattr(error, "cause", None) is not None:
        error = error.cause
    if isinstance(error, RequestError | RunFailed):
        return error
    lines = str(error).strip().splitlines() or [""]
    # Without the error itself Tune gives the traceback's text, whose last line is the error.
    return RunFailed(lines[-1] if isinstance(error, str) else f"{type(error).__name__}: {lines[0]}")


def _conclude(config: Config, trials: Sequence[Trial], outcomes: Mapping[str, Any], terminal: Terminal) -> Config:
    """Write ``tune_results.json`` and ``best.yaml``; complain about what is lacking."""
    metric, directory = config.tune.metric, config.run_directory
    results = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, Exception)}
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    for found in results.values():
        if metric not in found:
            ours = [key for key in _read_results(trials, found["run_name"]) if isinstance(key, str)]
            raise RequestError(f"tune.metric={metric!r} is not among the results: {', '.join(sorted(ours))}")
    if len(outcomes) < len(trials):
        raise KeyboardInterrupt  # Tune catches the signal itself, and ends in order
    done = [trial for trial in trials if _is_finite(results.get(trial.name, {}).get(metric))]
    done.sort(key=lambda trial: results[trial.name][metric], reverse=config.tune.mode == "max")
    rows = [{"run": t.name, metric: results[t.name][metric], "config": t.values} for t in done]
    write_json(directory / "tune_results.json", {"metric": metric, "mode": config.tune.mode, "trials": rows})
    if not done:
        raise errors[0] if errors else RunFailed(f"no trial gave a finite {metric}")
    best = with_overrides(config, {**done[0].values, "run.name": f"{config.run.name}-best", "tune.space": {}})
    write_atomically(directory / "best.yaml", best.to_yaml())
    for trial in done:
        terminal.line(f"{metric} {_number(results[trial.name][metric])} | {trial} | {trial.name}")
    terminal.line(f"best config: {config.run_place / 'best.yaml'}")
    if errors:
        raise RunFailed(
            f"{len(errors)} of {len(trials)} trials failed, and best.yaml is the best of the others: {errors[0]}"
        )
    return best


def _read_results(trials: Sequence[Trial], name: str) -> dict[str, Any]:
    """What a trial's run gave, without what Tune adds."""
    trial = next(trial for trial in trials if trial.name == name)
    with open_read_only(trial.config.run_place, Terminal().line) as directory:
        return directory.read_results("all")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
