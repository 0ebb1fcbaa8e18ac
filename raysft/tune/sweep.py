"""Run a sweep: whole runs over a grid of config values, through Ray Tune."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysft.cluster.placement import Node
from raysft.config import Config, with_overrides
from raysft.errors import RequestError, RunFailed, one_line
from raysft.run.pipeline import run
from raysft.run.preflight import Preflight, preflight
from raysft.run.resources import check_resources
from raysft.storage.json_files import write_atomically, write_json
from raysft.storage.sync import open_read_only
from raysft.telemetry.terminal import Terminal
from raysft.tune.trials import TRIAL_CPUS, Trial, check_metric, combinations, concurrent_trials, with_engines


def tune(config: Config) -> Config:
    """Run every combination of ``tune.space`` and write the best config as ``best.yaml``.

    All trials share the tokenized shards and the converted model, which are made before the first trial starts. A sweep that
    is started again runs only the trials that are missing.

    Args:
        config: the config that all trials share, with ``tune.space``.

    Returns:
        The best trial's config, ready to run by itself.

    Raises:
        RequestError: the space is empty or has unknown keys, or a trial cannot run.
        RunFailed: a trial failed; the results of the others are written all the same.
    """
    trials = combinations(config)
    for trial in trials:
        check_metric(trial.config, config.tune.metric)
    with preflight(config, "tune", trials=[trial.config for trial in trials], place=_place) as ready:
        trials = [replace(trial, config=placed) for trial, placed in zip(trials, ready.configs, strict=True)]
        return _run_trials(config, trials, ready)


def _place(config: Config, nodes: Sequence[Node]) -> Config:
    """Return a trial's config with as many engines as fit beside it."""
    check_resources(config, nodes, reserved_cpus=TRIAL_CPUS)
    return with_engines(config, nodes)


def _run_trials(config: Config, trials: Sequence[Trial], ready: Preflight) -> Config:
    fitting = min(concurrent_trials(trial.config, ready.nodes) for trial in trials)
    concurrent = min(fitting, len(trials), config.tune.max_concurrent or fitting)
    for planned in ready.runs:
        for line in planned.plan.lines():
            ready.terminal.line(line)
    ready.terminal.line(
        f"tune: {len(trials)} trials, {concurrent} at a time, best by {config.tune.mode} {config.tune.metric}; "
        f"their runs: {config.run_place / 'trials'}"
    )
    write_atomically(ready.directory.config, config.to_yaml())
    return _conclude(config, trials, _fit(config, trials, concurrent), ready.terminal)


def _fit(config: Config, trials: Sequence[Trial], concurrent: int) -> dict[str, Any]:
    """Run the trials and return the results or the error of each by its name; interrupted trials are left out."""
    import ray.tune

    folder = config.run_directory / "tune"
    shutil.rmtree(folder, ignore_errors=True)  # Tune's records of an earlier call; the runs are elsewhere
    progress, stop = _watchers(config.tune.metric, {trial.name: str(trial) for trial in trials})
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(_trainable(trials), {"cpu": TRIAL_CPUS}),
        # Names, since Tune replaces lists and mappings by placeholders and evaluates some strings as code.
        param_space={"trial": ray.tune.grid_search([trial.name for trial in trials])},
        tune_config=ray.tune.TuneConfig(
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
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
    """Silence Tune's tables, tracebacks and advice: we print a line for each trial, and each failure once."""
    logger, switch = logging.getLogger("ray.tune"), "RAY_AIR_NEW_OUTPUT"
    level, before = logger.level, os.environ.get(switch)
    logger.setLevel(logging.CRITICAL)
    os.environ[switch] = "0"  # the new output prints tables even at verbose=0, and has no other switch
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
        # Tune changes into a folder of the trial, but paths in the config are relative to ours.
        with contextlib.suppress(FileNotFoundError):
            os.chdir(home)
        name = values["trial"]
        ray.tune.report({**run(Config.model_validate(configs[name])), "run_name": name})

    import ray.tune

    return trial


def _watchers(metric: str, named: Mapping[str, str]) -> tuple[Any, Any]:
    """Return a callback that prints a line for each trial, and a stopper.

    Tune pickles both, so neither keeps a terminal.
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
        """Stop the sweep after the first trial without the metric: no other trial would have it."""

        def __init__(self) -> None:
            self.found = False

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            self.found = self.found or ("run_name" in result and metric not in result)
            return False

        def stop_all(self) -> bool:
            return self.found

    return Progress(), WithoutMetric()


def _reason(error: Any) -> Exception:
    """Return the error that a trial failed with, as one of ours with a one-line message."""
    while getattr(error, "cause", None) is not None:
        error = error.cause
    if isinstance(error, RequestError | RunFailed):
        return error
    if isinstance(error, str):
        # If Tune has no error object, it gives the text of the traceback, which ends with the error.
        return RunFailed(one_line(error.strip().rpartition("\n")[2]))
    return RunFailed(f"{type(error).__name__}: {one_line(error)}")


def _conclude(config: Config, trials: Sequence[Trial], outcomes: Mapping[str, Any], terminal: Terminal) -> Config:
    """Write ``tune_results.json`` and ``best.yaml``, then raise if trials failed or lack the metric."""
    metric, directory = config.tune.metric, config.run_directory
    results = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, Exception)}
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    for found in results.values():
        if metric not in found:
            ours = [key for key in _read_results(trials, found["run_name"]) if isinstance(key, str)]
            raise RequestError(
                f"tune.metric={metric!r} is not a result of these runs; use one of {', '.join(sorted(ours))}"
            )
    if len(outcomes) < len(trials):
        raise KeyboardInterrupt  # Tune has handled the signal and returned
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
            f"{len(errors)} of {len(trials)} trials failed ({errors[0]}); best.yaml is the best of the others; start the same "
            "command again to retry the failed ones"
        )
    return best


def _read_results(trials: Sequence[Trial], name: str) -> dict[str, Any]:
    """Results of a trial's run, without the keys that Tune adds."""
    trial = next(trial for trial in trials if trial.name == name)
    with open_read_only(trial.config.run_place, Terminal().line) as directory:
        return directory.read_results("all")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
