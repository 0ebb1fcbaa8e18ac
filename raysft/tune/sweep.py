"""Run a sweep: whole runs with different config values, through Ray Tune."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.errors import RunFailed
from raysft.run.preflight import Preflight, preflight
from raysft.run.resources import check_resources
from raysft.run.tracking import sweep_trackers
from raysft.storage.json_files import write_atomically
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.trackers import tracker_variables
from raysft.tune.earlier_call import await_release, earlier_trials
from raysft.tune.optuna_study import OptunaStudy, check_installed, restored
from raysft.tune.ranking import Objectives
from raysft.tune.record import Record, TrialRecord
from raysft.tune.results import check_recorded, expected, print_ranking, rank, write_best, write_results
from raysft.tune.schedulers import check_scheduler, make_scheduler
from raysft.tune.sources import FixedList, Source
from raysft.tune.space import dimensions
from raysft.tune.trials import (
    TRIAL_CPUS,
    Trial,
    check_metric,
    combinations,
    concurrent_trials,
    probes,
    repeats,
    with_engines,
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
        RunFailed: a trial failed; the results of the others are written all the same.
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
    check_scheduler(config, [trial.config for trial in trials])
    with preflight(config, "tune", trials=[trial.config for trial in trials], place=_place) as ready:
        return _run_trials(config, firsts, ready)


def _place(config: Config, nodes: Sequence[Node]) -> Config:
    """Return a trial's config with as many engines as fit beside it."""
    check_resources(config, nodes, reserved_cpus=TRIAL_CPUS)
    return with_engines(config, nodes)


def _run_trials(config: Config, firsts: Sequence[Trial], ready: Preflight) -> Config:
    from raysft.tune.search import Search

    record = Record(ready.directory.trials)
    record.repair()
    recorded = earlier_trials(config, record)
    await_release(config, recorded, ready.terminal.line)
    source = _source(config, firsts, recorded, ready.nodes)
    known = [trial for first in source.trials for trial in repeats(config, first)]
    before = expected(recorded, known)
    total = (config.tune.num_samples or len(firsts)) * config.tune.repeats
    fitting = min(concurrent_trials(one, ready.nodes) for one in ready.configs)
    concurrent = min(fitting, total, config.tune.max_concurrent or fitting)
    for planned in ready.runs:
        for line in planned.plan.lines():
            ready.terminal.line(line)
    scheduler = make_scheduler(config, max(planned.plan.steps for planned in ready.runs), concurrent)
    ready.terminal.line(_announcement(config, total, concurrent, sum(one.ended_well for one in before.values())))
    write_atomically(ready.directory.config, config.to_yaml())
    nodes = ready.nodes  # Tune pickles the search, so that it keeps no terminal
    search = Search(config, source, recorded, lambda trial: _place(trial, nodes))
    with sweep_trackers(config, ready.terminal):
        errors = _fit(config, search, scheduler, record, total, concurrent)
    return _conclude(config, source, record, errors, ready.terminal)


def _source(
    config: Config, firsts: Sequence[Trial], recorded: Mapping[str, TrialRecord], nodes: Sequence[Node]
) -> Source:
    """Return what gives the configurations, for Optuna with those of an earlier call."""
    if config.tune.search != "optuna":
        return FixedList(firsts)

    def accept(trial: Config) -> None:
        for metric in Objectives.of(config.tune).metrics:
            check_metric(trial, metric)
        _place(trial, nodes)

    # Tune pickles its search, so that it keeps no terminal.
    return OptunaStudy(config, restored(config, recorded), accept, lambda line: Terminal().line(line))


def _announcement(config: Config, total: int, concurrent: int, ended: int) -> str:
    seeds = f" ({total // config.tune.repeats} configurations with {config.tune.repeats} seeds)"
    return (
        f"tune: {total} trials{seeds if config.tune.repeats > 1 else ''}, {concurrent} at a time, "
        + (f"{ended} done before, " if ended else "")
        + f"best by {Objectives.of(config.tune)}; their runs: {config.run_place / 'trials'}"
    )


def _fit(
    config: Config, search: Any, scheduler: Any, record: Record, total: int, concurrent: int
) -> dict[str, Exception] | None:
    """Run the trials that have not ended, and return the error of each that failed by its name; None after an interruption."""
    import ray.tune

    from raysft.tune.progress import reason_of, recorder, stopper

    space: dict[str, Any] = {}
    searched: dict[str, Any] = {"search_alg": search, "num_samples": -1, "max_concurrent_trials": concurrent}
    if config.tune.scheduler == "pbt":
        from raysft.tune.population import members

        scheduler.members = members(search, record.read())
        if not scheduler.members:
            return {}  # all have ended
        # Names alone: Tune replaces lists and mappings by placeholders.
        space, searched = {"trial": ray.tune.grid_search(list(scheduler.members))}, {}
    watching = recorder(config, record, total, concurrent)
    # Tune's own records, which nothing reads again: a sweep goes on from its own.
    with tempfile.TemporaryDirectory(prefix="raysft-tune-", ignore_cleanup_errors=True) as folder:
        tuner = ray.tune.Tuner(
            _trainable(config),
            param_space=space,
            tune_config=ray.tune.TuneConfig(
                **searched,
                scheduler=scheduler,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=ray.tune.RunConfig(
                name="tune",
                storage_path=folder,
                verbose=0,
                callbacks=[watching],
                stop=stopper(config),
                failure_config=ray.tune.FailureConfig(max_failures=config.tune.max_failures),
            ),
        )
        try:
            with _quiet_tune():
                grid = tuner.fit()
        finally:
            watching.close()
    errors = {Path(result.path).name: reason_of(result.error) for result in grid if result.error}
    return errors if search.finished else None


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Silence Tune's tables, tracebacks and advice: we print a line for each trial, and each failure once."""
    logger, switch = logging.getLogger("ray.tune"), "RAY_AIR_NEW_OUTPUT"
    level, before = logger.level, os.environ.get(switch)
    logger.setLevel(logging.CRITICAL)
    os.environ[switch] = "0"  # the new output prints tables even at verbose=0, and has no other switch
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def _trainable(config: Config) -> Any:
    import ray.tune

    from raysft.tune.trainable import Trainable, TrialSettings

    settings = TrialSettings(
        scheduled=config.tune.scheduler != "none", home=os.getcwd(), environment=tracker_variables()
    )
    trial = ray.tune.with_parameters(Trainable, settings=settings)
    return ray.tune.with_resources(trial, {"cpu": TRIAL_CPUS})


def _conclude(
    config: Config,
    source: Source,
    record: Record,
    errors: Mapping[str, Exception] | None,
    terminal: Terminal,
) -> Config:
    """Write the results, then raise if trials failed or lack the metric; ``errors`` is None if the search was interrupted."""
    from raysft.report import write_sweep_page

    trials = [trial for first in source.trials for trial in repeats(config, first)]
    records = expected(record.read(), trials)
    check_recorded(config, records)
    if errors is None or any(trial.name not in records or records[trial.name].state == "running" for trial in trials):
        raise KeyboardInterrupt  # Tune has handled the signal and returned
    ranking = rank(config, records)
    write_results(config.run_directory, config, records, ranking)
    first_error = next(iter(errors.values()), None)
    if not ranking:
        raise first_error or RunFailed(f"no trial gave a finite {config.tune.metric}")
    best = write_best(config.run_directory, config, ranking[0])
    print_ranking(config, ranking, terminal)
    terminal.line(f"page: {config.run_place / write_sweep_page(RunDirectory.of(config.run_place)).name}")
    if errors:
        raise RunFailed(
            f"{len(errors)} of {len(trials)} trials failed ({first_error}); best.yaml is the best of the others; start the same "
            "command again to retry the failed ones"
        )
    return best
