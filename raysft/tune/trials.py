"""Trials of a sweep: their configs, and the resources that each of them takes."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysft.cluster.placement import TASK_CPUS, Node, max_workers, total
from raysft.config import Config, with_overrides
from raysft.errors import RequestError, as_override
from raysft.run.trial_plans import value_at
from raysft.tune.space import Dimension, dimensions

TRIAL_CPUS = 0.1
"""CPUs that the process of a trial reserves. It only drives; workers, data tasks and engines reserve their own."""
DRAWS = 1000
"""Draws per configuration that are given to a random search to find different ones."""
PROBES = 64
"""Combinations of other values that are tried with a value before it is refused."""


@dataclass(frozen=True)
class Trial:
    """One configuration of ``tune.space`` with one seed."""

    name: str
    """Name of its run directory in ``trials/``. It follows from the values, so a restarted sweep finds its trials."""
    values: dict[str, Any]
    """Value by dotted key."""
    config: Config
    """Config of the whole run."""
    configuration: str
    """Name of the trial with the same values and the sweep's own seed: equal for repeats."""

    def __str__(self) -> str:
        seed = f", seed {self.config.run.seed}" if self.name != self.configuration else ""
        return described(self.values) + seed


def described(values: Mapping[str, Any]) -> str:
    """Show values in one line.

    >>> described({"train.learning_rate": 0.00012345678, "model.lora.rank": 8, "train.recompute_layers": None})
    'train.learning_rate=0.00012346, model.lora.rank=8, train.recompute_layers=null'
    """
    return ", ".join(f"{key}={_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) and len(str(value)) > 8 else as_override(value)


def combinations(config: Config) -> list[Trial]:
    """Return the first trial of every configuration of a grid or a random search, each with a valid config.

    Raises:
        RequestError: a key is unknown or cannot vary, a value is wrong, or the space has too few configurations.
    """
    space = dimensions(config)
    if config.tune.search == "random":
        return _draws(config, space)
    trials: dict[str, Trial] = {}
    for values in itertools.product(*(dimension.values for dimension in space)):
        trial = make_trial(config, dict(zip(config.tune.space, values, strict=True)))
        if trial.name in trials:
            raise RequestError(f"tune.space has {trial} twice; keep one")
        trials[trial.name] = trial
    return list(trials.values())


def _draws(config: Config, space: Sequence[Dimension]) -> list[Trial]:
    """Draw different configurations. A larger number begins with those of a smaller one."""
    probes(config, space)  # a value that is drawn rarely would be found late
    numbers, wanted = random.Random(config.tune.seed), config.tune.num_samples or 0
    trials: dict[str, Trial] = {}
    for _ in range(DRAWS * wanted):
        trial = make_trial(config, {dimension.key: dimension.draw(numbers) for dimension in space})
        trials.setdefault(trial.name, trial)
        if len(trials) == wanted:
            return list(trials.values())
    raise RequestError(
        f"tune.num_samples={wanted}, but {DRAWS * wanted} draws from tune.space gave {len(trials)} different configurations; "
        "lower it, or add values"
    )


def probes(config: Config, space: Sequence[Dimension]) -> dict[str, list[Trial]]:
    """Find a valid config for every choice and for the ends of every range.

    Where settings depend on each other, a value may need values other than the first ones with it.

    Returns:
        Trials by key, in the order of ``Dimension.probes``.

    Raises:
        RequestError: a value makes no valid config, whichever other values go with it.
    """
    return {dimension.key: [_probe(config, space, dimension, one) for one in dimension.probes()] for dimension in space}


def _probe(config: Config, space: Sequence[Dimension], dimension: Dimension, value: Any) -> Trial:
    beside = itertools.product(*([value] if other is dimension else other.probes() for other in space))
    refusal: RequestError | None = None
    for values in itertools.islice(beside, PROBES):
        try:
            return make_trial(config, dict(zip((other.key for other in space), values, strict=True)))
        except RequestError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def make_trial(config: Config, values: Mapping[str, Any], repeat: int = 0) -> Trial:
    """Make a trial of some values.

    Args:
        config: the sweep's config.
        values: value by dotted key.
        repeat: number of the repeat, which adds to the seed.

    Raises:
        RequestError: they make no valid config.
    """
    fixed = {
        "run.sweep": config.run.sweep or config.run.name,
        "run.storage": (config.run_place / "trials").location,
        "data.cache": config.cache_directory.location,
        "tune": {},
    }
    try:
        whole = with_overrides(config, {**values, **fixed})
    except RequestError as error:
        reason = str(error).removeprefix("an override: ").removeprefix("override: ")
        raise RequestError(f"tune.space: {reason}") from None
    # As the config parses them: YAML reads 1e-5 as text.
    dumped = whole.model_dump(mode="json")
    values = {key: value_at(dumped, key) for key in values}
    text = "-".join(f"{key.rpartition('.')[2]}-{_shown(value)}" for key, value in values.items())
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", text)[:80].strip("-._")
    name = f"{readable}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]}"
    if not repeat:
        return Trial(name, values, with_overrides(whole, {"run.name": name}), name)
    seed = whole.run.seed + repeat
    repeated = f"{name}-seed{seed}"
    return Trial(repeated, values, with_overrides(whole, {"run.name": repeated, "run.seed": seed}), name)


def repeats(config: Config, first: Trial) -> list[Trial]:
    """Return the trials of a configuration, one for each seed; the first one keeps its name when ``tune.repeats`` is raised."""
    return [first, *(make_trial(config, first.values, repeat) for repeat in range(1, config.tune.repeats))]


def with_engines(config: Config, nodes: Sequence[Node]) -> Config:
    """Set the number of engines of a trial: by default they would spread over the whole cluster, where other trials train.

    Raises:
        RequestError: no engine fits alongside the trial itself.
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
                f"generation in a trial needs {engines} whole CPUs in addition to {TRIAL_CPUS:g} for the trial's own process, "
                f"but the cluster has {sum(whole_cpus)}; set generate.enabled=false, or add CPUs"
            )
    return with_overrides(config, {"generate.num_actors": engines})


def concurrent_trials(config: Config, nodes: Sequence[Node], wanted: int | None = None) -> int:
    """Number of trials that fit into the cluster at a time; Tune does not count the processes that a trial starts.

    Args:
        config: a trial's config. If it is elastic, it counts with its most workers.
        nodes: the cluster's nodes.
        wanted: number that is asked for. If so many elastic trials fit only with fewer workers each, they are as many.
    """
    with_most = _fitting(config, nodes, config.scaling.most_workers)
    with_fewest = _fitting(config, nodes, config.scaling.fewest_workers)
    return max(1, with_most, min(wanted or 1, with_fewest))


def _fitting(config: Config, nodes: Sequence[Node], workers: int) -> int:
    """Number of trials with this many workers that fit into the cluster at a time."""
    scaling = config.scaling
    engines = (config.generate.num_actors or 0) if config.generates else 0
    cpus = workers * scaling.cpus_per_worker + TASK_CPUS
    if not scaling.use_gpu:
        cpus = max(cpus, engines)
    gpus = max(workers, engines * config.generate.gpus_per_engine) if scaling.use_gpu else 0.0
    return total([node for node in nodes if node.takes_workers]).capacity(cpus + TRIAL_CPUS, gpus)


def with_share(config: Config, nodes: Sequence[Node], concurrent: int) -> Config:
    """Limit an elastic trial to the workers that fit alongside other trials, and alongside its own process and its data tasks.

    Ray Train asks for as many as fit on the nodes, regardless of what else is there: one trial would hold what the next one
    waits for.

    Args:
        config: a trial's config.
        nodes: the cluster's nodes.
        concurrent: trials at a time.
    """
    scaling = config.scaling
    if not scaling.is_elastic:
        return config
    fewest, beside = scaling.fewest_workers, max_workers(nodes, scaling.cpus_per_worker, scaling.use_gpu, TRIAL_CPUS)
    most = scaling.whole_groups(min(scaling.most_workers, beside))
    counts = range(most, fewest, -scaling.sequence_parallel)
    most = next((count for count in counts if _fitting(config, nodes, count) >= concurrent), fewest)
    return with_overrides(config, {"scaling.num_workers": [fewest, most]})
