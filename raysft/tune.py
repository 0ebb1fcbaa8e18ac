"""A sweep: whole runs over a grid of config values, through Ray Tune."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from raysft.config import Config, RequestError
from raysft.log import Terminal
from raysft.plan import check_resources
from raysft.records import RunDirectory, write_atomically, write_json
from raysft.run import check, cluster, run

TRIAL_CPUS = 0.1
"""What a trial's own process reserves: it only drives; workers and data tasks reserve their own."""


def tune(config: Config) -> Config:
    """Run every combination of ``tune.space`` and write the best config as ``best.yaml``.

    All trials share the tokenized shards and the converted model, which are made before the first of them starts.

    Args:
        config: what all trials have in common, with ``tune.space``.

    Returns:
        The best trial's config, ready to run by itself.

    Raises:
        RequestError: the space is empty or names unknown keys, or the cluster cannot place a trial.
        RunFailed: no trial gave the metric.
    """
    space = config.tune.space
    if not space:
        raise RequestError(
            "tune.space is empty; name keys and values to try, for example {train.learning_rate: [1.0e-4, 3.0e-4]}"
        )
    for key, values in space.items():
        for value in values:
            _trial_config(config, {key: value}, "check")
    directory = RunDirectory(config.run_directory)
    terminal = Terminal()
    with cluster(config) as nodes:
        check_resources(config, nodes, reserved_cpus=TRIAL_CPUS)
        for combination in _shared_by(space):
            check(_trial_config(config, combination, "check"))
        count = math.prod(len(values) for values in space.values())
        concurrent = _concurrent(config, nodes)
        terminal.line(f"tune: {count} trials, {concurrent} at a time, best by {config.tune.mode} {config.tune.metric}")
        results = _fit(config, directory, concurrent)
    return _conclude(config, directory, results, terminal)


def _shared_by(space: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """One combination for each way in which the data differs between trials: these are prepared before the trials."""
    combinations: list[dict[str, Any]] = [{key: values[0] for key, values in space.items()}]
    for key, values in space.items():
        if key.startswith(("data.", "model.path")):
            combinations = [{**combination, key: value} for combination in combinations for value in values]
    return combinations


def _trial_config(config: Config, combination: dict[str, Any], name: str) -> Config:
    folder = config.run_directory / "trials"
    return config.with_overrides(
        {
            **combination,
            "run.storage": str(folder),
            "run.name": name,
            "data.cache": str(config.cache_directory),
            "tune.space": {},
        }
    )


def _concurrent(config: Config, nodes: list[dict[str, float]]) -> int:
    """How many trials the cluster can hold at a time; Tune does not count what the workers of a trial take."""
    from raysft.data.shards import TASK_CPUS

    scaling = config.scaling
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    fits = int(cpus / (scaling.num_workers * scaling.cpus_per_worker + TASK_CPUS + TRIAL_CPUS) + 1e-9)
    if scaling.use_gpu:
        fits = min(fits, int(sum(node.get("GPU", 0.0) for node in nodes) / scaling.num_workers))
    return max(1, min(fits, config.tune.max_concurrent or fits))


def _fit(config: Config, directory: RunDirectory, concurrent: int) -> Any:
    import ray.tune

    directory.path.mkdir(parents=True, exist_ok=True)
    write_atomically(directory.config, config.to_yaml())
    raw = config.model_dump(mode="json")
    metric = config.tune.metric

    def trial(combination: dict[str, Any]) -> None:
        name = ray.tune.get_context().get_trial_name()
        results = run(_trial_config(Config.model_validate(raw), combination, name))
        if metric not in results:
            raise RequestError(f"tune.metric={metric!r} is not among the results: {', '.join(sorted(results))}")
        ray.tune.report({**results, "run_name": name})

    return ray.tune.Tuner(
        ray.tune.with_resources(trial, {"cpu": TRIAL_CPUS}),
        param_space={key: ray.tune.grid_search(values) for key, values in config.tune.space.items()},
        tune_config=ray.tune.TuneConfig(
            metric=metric,
            mode=config.tune.mode,
            max_concurrent_trials=concurrent,
            trial_name_creator=lambda it: f"trial-{it.trial_id}",
            trial_dirname_creator=lambda it: f"trial-{it.trial_id}",
        ),
        run_config=ray.tune.RunConfig(name="tune", storage_path=str(directory.path), verbose=0),
    ).fit()


def _conclude(config: Config, directory: RunDirectory, results: Any, terminal: Terminal) -> Config:
    from raysft.records import RunFailed

    metric = config.tune.metric
    done = [result for result in results if not result.error and result.metrics and metric in result.metrics]
    for result in results:
        if result.error:
            terminal.line(f"failed: {result.config}: {str(result.error).strip().splitlines()[-1]}")
    if not done:
        raise RunFailed(f"no trial gave {metric}; see the errors above")
    done.sort(key=lambda result: result.metrics[metric], reverse=config.tune.mode == "max")
    rows = [{"run": r.metrics["run_name"], metric: r.metrics[metric], "config": r.config} for r in done]
    for row in rows:
        values = ", ".join(f"{key}={value}" for key, value in row["config"].items())
        terminal.line(f"{row['run']} | {metric} {row[metric]:.4f} | {values}")
    write_json(directory.path / "tune_results.json", {"metric": metric, "mode": config.tune.mode, "trials": rows})
    best = config.with_overrides({**done[0].config, "run.name": f"{config.run.name}-best", "tune.space": {}})
    path = Path(directory.path / "best.yaml")
    write_atomically(path, best.to_yaml())
    terminal.line(f"best config: {path}")
    return best
