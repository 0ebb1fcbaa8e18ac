"""Trials of a grid: their configs, and the resources that each of them takes."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raysft.cluster.placement import TASK_CPUS, Node, total
from raysft.config import Config, with_overrides
from raysft.errors import RequestError
from raysft.telemetry.events import Evaluation, evaluation_results

TRIAL_CPUS = 0.1
"""CPUs that the process of a trial reserves. It only drives; workers, data tasks and engines reserve their own."""
RESERVED = ("run.name", "run.storage", "data.cache", "scaling.address", "tune")
"""Keys that the sweep sets itself."""


@dataclass(frozen=True)
class Trial:
    """One combination of ``tune.space``."""

    name: str
    """Name of its run directory in ``trials/``. It follows from the values, so a restarted sweep finds its trials."""
    values: dict[str, Any]
    """Value by dotted key."""
    config: Config
    """Config of the whole run."""

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items())


def combinations(config: Config) -> list[Trial]:
    """Return all trials of the grid, each with a valid config.

    Raises:
        RequestError: a key is unknown or cannot vary, or a value is wrong.
    """
    space = config.tune.space
    if not space:
        raise RequestError(
            "tune.space is empty; give keys and values to try, for example {train.learning_rate: [1.0e-4, 3.0e-4]}"
        )
    for key in space:
        if key in RESERVED or key.partition(".")[0] in RESERVED:
            raise RequestError(f"tune.space: {key} is the same for all trials; remove it from tune.space")
    trials: dict[str, Trial] = {}
    for values in itertools.product(*space.values()):
        trial = _trial(config, dict(zip(space, values, strict=True)))
        if trial.name in trials:
            raise RequestError(f"tune.space has {trial} twice; keep one")
        trials[trial.name] = trial
    return list(trials.values())


def _trial(config: Config, values: dict[str, Any]) -> Trial:
    fixed = {
        "run.storage": (config.run_place / "trials").location,
        "data.cache": config.cache_directory.location,
        "tune.space": {},
    }
    try:
        whole = with_overrides(config, {**values, **fixed})
    except RequestError as error:
        raise RequestError(f"tune.space: {str(error).removeprefix('override: ')}") from None
    # As the config parses them: YAML reads 1e-5 as text.
    values = {key: _value(whole.model_dump(mode="json"), key) for key in values}
    text = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", text)[:80].strip("-._")
    name = f"{readable}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]}"
    return Trial(name, values, with_overrides(whole, {"run.name": name}))


def _value(dumped: Any, key: str) -> Any:
    for part in key.split("."):
        dumped = dumped[int(part)] if isinstance(dumped, list) else dumped[part]
    return dumped


def check_metric(config: Config, metric: str) -> None:
    """Refuse a metric that no run of this config gives, as far as that is known before the first run."""
    sets = [source.name for source in config.data.eval]
    sets += [source.name for source in config.data.train] if config.data.holdout else []
    known = list(evaluation_results([Evaluation(name, 0, 0.0, 0.0, 1) for name in sets]))
    reason = ""
    if metric.startswith("eval_") and metric not in known:
        reason = f"use one of {', '.join(known)}" if known else "they evaluate nothing; set data.eval or data.holdout"
    elif metric.startswith(("predict_", "base_predict_")) and not config.generates:
        remedy = "set stage=sft and generate.enabled=true, and give data.eval, data.holdout or generate.sources"
        reason = f"they generate nothing; {remedy}"
    if reason:
        raise RequestError(f"tune.metric={metric!r} is not a result of these runs; {reason}")


def with_engines(config: Config, nodes: Sequence[Node]) -> Config:
    """Set the number of engines of a trial: by default they would spread over the whole cluster, where other trials train.

    Raises:
        RequestError: no engine fits beside the trial itself.
    """
    if not config.generates:
        return config
    scaling = config.scaling
    if scaling.use_gpu:
        engines = config.generate.num_actors or max(1, scaling.most_workers // config.generate.gpus_per_engine)
    else:
        # An engine needs a whole CPU, and the trial's own process takes a part of one.
        whole_cpus = [node.capacity(cpus=1.0) for node in nodes]
        trial_cpus = max(1, int(scaling.most_workers * scaling.cpus_per_worker))
        nodes_with_cpu = sum(1 for cpus in whole_cpus if cpus)
        engines = config.generate.num_actors or min(trial_cpus, max(1, nodes_with_cpu))
        if engines > sum(whole_cpus) - 1:
            raise RequestError(
                f"generation in a trial needs {engines} whole CPUs beside {TRIAL_CPUS:g} for the trial's own process, but the "
                f"cluster has {sum(whole_cpus)}; set generate.enabled=false, or add CPUs"
            )
    return with_overrides(config, {"generate.num_actors": engines})


def concurrent_trials(config: Config, nodes: Sequence[Node]) -> int:
    """Number of trials that fit into the cluster at a time; Tune does not count the processes that a trial starts."""
    scaling = config.scaling
    engines = (config.generate.num_actors or 0) if config.generates else 0
    cpus = scaling.most_workers * scaling.cpus_per_worker + TASK_CPUS
    if not scaling.use_gpu:
        cpus = max(cpus, engines)
    gpus = max(scaling.most_workers, engines * config.generate.gpus_per_engine) if scaling.use_gpu else 0.0
    return max(1, total(nodes).capacity(cpus + TRIAL_CPUS, gpus))
