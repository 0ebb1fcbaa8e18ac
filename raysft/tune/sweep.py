"""Run a sweep: whole runs with different config values, through Ray Tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.run.preflight import Preflight, check_trials, preflight
from raysft.run.resources import check_resources
from raysft.run.tracking import sweep_trackers
from raysft.run.trial_plans import PlannedRun, memory_key, plan_trials
from raysft.storage.json_files import read_jsonl, write_atomically
from raysft.telemetry.terminal import Terminal
from raysft.train.intervals import Interval
from raysft.tune.earlier_call import await_release, earlier_trials
from raysft.tune.earlier_results import replay
from raysft.tune.metrics import check_directions, check_metric
from raysft.tune.optuna_study import OptunaStudy, check_installed, restored
from raysft.tune.ranking import Objectives
from raysft.tune.record import Record, TrialRecord
from raysft.tune.results import expected
from raysft.tune.running_sweep import Sweep
from raysft.tune.schedulers import check_scheduler, make_scheduler
from raysft.tune.sources import FixedList, Source
from raysft.tune.space import dimensions
from raysft.tune.trials import (
    TRIAL_CPUS,
    Trial,
    combinations,
    concurrent_trials,
    probes,
    repeats,
    with_engines,
    with_share,
)


def tune(config: Config) -> Config:
    """Try the values of ``tune.space``, each in a whole run, and write the best config as ``best.yaml``.

    All trials share the tokenized shards and the converted model, which are made before the first trial starts. A sweep that
    is started again runs only the trials that are missing or failed.

    Args:
        config: the config that all trials share, with ``tune.space``.

    Returns:
        The best config, ready to run by itself.

    Raises:
        RequestError: the space is empty or has unknown keys, or a trial cannot run.
        RunFailed: a trial failed; the results of the others are written anyway.
    """
    space, objectives = dimensions(config), Objectives.of(config.tune)
    if config.tune.search == "optuna":
        check_installed()
        # What Optuna will suggest is not known yet; these have every choice and the ends of every range.
        firsts = [trial for probed in probes(config, space).values() for trial in probed]
        trials = list({trial.name: trial for trial in firsts}.values())
    else:
        firsts = combinations(config)
        trials = [trial for first in firsts for trial in repeats(config, first)]
    for trial in trials:
        for metric in objectives.metrics:
            check_metric(trial.config, metric)
    check_directions(config.tune)
    check_scheduler(config, [trial.config for trial in trials])
    with preflight(config, "tune", trials=[trial.config for trial in trials], place=_place) as ready:
        return _run_trials(config, firsts, ready)


def _place(config: Config, nodes: Sequence[Node], concurrent: int = 1) -> Config:
    """Return a trial's config with the workers that fit alongside other trials, and as many engines as fit alongside it."""
    check_resources(config, nodes, reserved_cpus=TRIAL_CPUS)
    return with_engines(with_share(config, nodes, concurrent), nodes)


def _run_trials(config: Config, firsts: Sequence[Trial], ready: Preflight) -> Config:
    from raysft.tune.search import Search

    record = Record(ready.directory.trials)
    record.repair()
    recorded = earlier_trials(config, record)
    await_release(config, recorded, ready.terminal.line)
    source = _source(config, firsts, recorded, ready.nodes, ready.configs)
    known = [trial for first in source.trials for trial in repeats(config, first)]
    before = expected(recorded, known)
    total = (config.tune.num_samples or len(firsts)) * config.tune.repeats
    fitting = min(concurrent_trials(one, ready.nodes, config.tune.max_concurrent) for one in ready.configs)
    concurrent = min(fitting, total, config.tune.max_concurrent or fitting)
    for line in dict.fromkeys(line for planned in ready.runs for line in planned.plan.lines()):
        ready.terminal.line(line)
    first = min(_first_evaluation(planned) for planned in ready.runs)
    scheduler = make_scheduler(config, first, max(planned.plan.steps for planned in ready.runs), concurrent)
    if config.tune.scheduler in ("asha", "median"):
        ended = [name for name, one in before.items() if one.ended_well]
        replay(scheduler, Objectives.of(config.tune).metrics[0], ended, read_jsonl(ready.directory.trials))
    ready.terminal.line(_announcement(config, total, concurrent, sum(one.ended_well for one in before.values())))
    write_atomically(ready.directory.config, config.to_yaml())
    ready.directory.trials.touch()  # it marks the directory of a sweep, also before the first trial
    nodes = ready.nodes  # Tune pickles the search, so that it keeps no terminal
    deadline = time.time() + 60 * config.tune.max_minutes if config.tune.max_minutes is not None else None
    search = Search(config, source, recorded, lambda trial: _place(trial, nodes, concurrent), deadline)
    sweep = Sweep(config, source, record, total, concurrent, deadline, ready.terminal)
    with sweep_trackers(config, ready.terminal):
        errors = sweep.fit(search, scheduler)
    return sweep.conclude(errors)


def _first_evaluation(planned: PlannedRun) -> int:
    """Return the step after which trials with this plan are evaluated first."""
    return Interval.of_evaluations(planned.config.train, planned.prepared.train_rows.row_plan).first()


def _source(
    config: Config,
    firsts: Sequence[Trial],
    recorded: Mapping[str, TrialRecord],
    nodes: Sequence[Node],
    checked: Sequence[Config] = (),
) -> Source:
    """Return what gives the configurations, for Optuna with those of an earlier call.

    Args:
        config: the sweep's config.
        firsts: the first trial of each configuration, unless Optuna gives them.
        recorded: the record of an earlier call, by trial.
        nodes: the cluster's nodes.
        checked: configs of trials whose memory has been looked at.
    """
    if config.tune.search != "optuna":
        return FixedList(firsts)
    fitting = set(map(memory_key, checked))

    def accept(trial: Config) -> None:
        for metric in Objectives.of(config.tune).metrics:
            check_metric(trial, metric)
        placed = _place(trial, nodes)
        if (needs := memory_key(placed)) not in fitting:
            plan_trials([placed], nodes, tuple(config.tune.space), lambda line: None)
            fitting.add(needs)

    found = restored(config, recorded)
    # Those of a list were among the trials of the preflight.
    check_trials([trial.config for one in found for trial in repeats(config, one.trial)], Terminal())
    # Tune pickles its search, so that it keeps no terminal.
    return OptunaStudy(config, found, accept, lambda line: Terminal().line(line))


def _announcement(config: Config, total: int, concurrent: int, ended: int) -> str:
    seeds = f" ({total // config.tune.repeats} configurations with {config.tune.repeats} seeds)"
    return (
        f"tune: {total} trials{seeds if config.tune.repeats > 1 else ''}, {concurrent} at a time, "
        + (f"{ended} done before, " if ended else "")
        + f"best by {Objectives.of(config.tune)}; their runs: {config.run_place / 'trials'}"
    )
