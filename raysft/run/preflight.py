"""Refuse what cannot run before anything starts: one order for all verbs, cheapest first.

1. Config: settings that the verb does not support.
2. Run directory: writable, not in use by others, and with the same config.
3. Packages: trackers and metrics.
4. Cluster: joined, with room for workers and engines.
5. Model: files, architecture, adapters, and what generation needs from it.
6. Data: tokenized into the cache; the model embeds every token, and the run can resume with it.
7. Needs: memory of workers and nodes, free space on the storage and access to it (``needs``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

from raysft.cluster.connect import cluster
from raysft.cluster.placement import Node
from raysft.config import Config
from raysft.config.verb import verb_of
from raysft.errors import RequestError
from raysft.run.best_metric import check_best_metric
from raysft.run.evaluation_plan import PlannedEvaluation, plan_evaluation
from raysft.run.inputs import (
    PromptInputs,
    check_evaluable,
    check_model_files,
    prepare_data,
    read_prompts,
    training_identity,
    untrained_ends,
)
from raysft.run.needs import with_needs
from raysft.run.other_model import OtherVerb, other_model, refuse_directory, refuse_results
from raysft.run.ownership import (
    Changes,
    check_ownership,
    differences,
    ensure_writable,
    exclusive_access,
    recorded_commit,
    recorded_reference_commit,
    refuse_other_kind,
    refuse_read_only,
    with_recorded_batch_size,
)
from raysft.run.plan import make_plan
from raysft.run.resources import check_resources
from raysft.run.stop_sources import watched, watched_node
from raysft.run.trial_plans import PlannedRun, is_part, plan_trials
from raysft.run.verb_checks import TRAINS_ONE, Verb, check_verb
from raysft.storage.retry import FIRST_SECONDS, retry_for
from raysft.storage.run_directory import RunDirectory
from raysft.storage.sync import open_read_only, synced
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.trackers import missing_tracker

ESTIMATED: tuple[Verb, ...] = ("run", "check", "train")
"""Verbs for one run that estimate what it needs."""
Place = Callable[[Config, Sequence[Node]], Config]
"""Returns the config fitted to the cluster, or raises RequestError."""
TRIALS_AT_A_TIME = 16
"""Trial run directories checked at a time."""


@dataclass(frozen=True)
class Preflight:
    """A request that passed all checks, with what they found for the next stage."""

    directory: RunDirectory
    push: Callable[[], None]
    """Returns once a run directory in an object store has all files written so far."""
    terminal: Terminal
    nodes: Sequence[Node]
    configs: tuple[Config, ...]
    """The config of each run, fitted to the cluster."""
    runs: tuple[PlannedRun, ...] = ()
    """One for a run; for trials, one for each way in which model, data or steps differ."""
    prompts: PromptInputs | None = None
    """For ``generate`` with ``generate.model``, or for a check of it."""
    evaluation: PlannedEvaluation | None = None
    """For ``evaluate`` with ``evaluate.model``, or for a check of it."""


@contextmanager
def preflight(
    config: Config,
    verb: Verb,
    allow_changed: bool = False,
    trials: Sequence[Config] = (),
    place: Place | None = None,
) -> Iterator[Preflight]:
    """Check a request in the order given above, and keep the run directory and the cluster open for the block.

    Until the block writes, only the cache is written to.

    Args:
        config: the request.
        verb: what to do with it.
        allow_changed: accept changed settings and data when a run resumes.
        trials: for ``tune``, the config of each trial.
        place: fits a run into the cluster. Default: ``check_resources``.

    Raises:
        RequestError: the request cannot be carried out.
    """
    runs, terminal = list(trials) or [config], Terminal()
    asked = _looked_at(config) if verb == "check" else verb
    other: OtherVerb | None = "generate" if asked == "generate" else "evaluate" if asked == "evaluate" else None
    if other and other_model(config, other) is None:
        other = None
    for run in runs:
        check_verb(run, asked)
    with _open_directory(config, verb, terminal) as (directory, push):
        changes: Changes = {}
        if other:
            refuse_directory(directory, config, other)
        else:
            refuse_results(directory)
            changes = check_ownership(directory, config, allow_changed if verb in TRAINS_ONE else None)
        refuse_other_kind(directory, asked)
        check_trials(trials, terminal, tuple(config.tune.space) if config.tune.scheduler == "pbt" else ())
        for run in runs if other != "evaluate" else ():
            check_packages(run, trains=not other)
        with cluster(config, deferred=verb in ("check", "prepare")) as nodes, watched_node():
            if other != "generate":
                runs = [(place or _placed)(run, nodes) for run in runs]
            for run in runs if other != "evaluate" else ():
                check_engines(run, nodes)
            ready = Preflight(directory, push, terminal, nodes, tuple(runs))
            if other == "generate":
                yield replace(ready, prompts=read_prompts(config, terminal.line))
            elif other == "evaluate":
                yield replace(ready, evaluation=plan_evaluation(config, nodes, terminal.line))
            elif trials:
                yield replace(ready, runs=tuple(plan_trials(runs, nodes, tuple(config.tune.space), terminal.line)))
            else:
                planned = _plan_run(runs[0], directory, nodes, changes, allow_changed, verb, terminal.line)
                yield replace(ready, runs=(planned,))


def _looked_at(config: Config) -> Verb:
    """The verb whose plan a check of a config shows; for a sweep it is that of its runs."""
    verb = verb_of(config)
    return verb if verb in ("evaluate", "generate") else "check"


def check_trials(trials: Sequence[Config], terminal: Terminal, varying: Sequence[str] = ()) -> None:
    """Refuse trials whose run directories belong to other settings.

    Args:
        trials: their configs.
        terminal: where waiting is reported.
        varying: keys that population-based training has changed in the meantime.
    """

    def check(trial: Config) -> None:
        with open_read_only(trial.run_place, terminal.line, only=("config.yaml", "trainer_log.jsonl")) as existing:
            if not all(is_part(key, varying) for key in differences(existing, trial)):
                check_ownership(existing, trial, allow_changed=None)

    begun = trials[0].run_place.parent.entries() if trials else {}
    # An object store takes a moment for each answer.
    with ThreadPoolExecutor(TRIALS_AT_A_TIME) as pool:
        list(pool.map(check, [trial for trial in trials if trial.run.name in begun]))


@contextmanager
def _open_directory(
    config: Config, verb: Verb, terminal: Terminal
) -> Iterator[tuple[RunDirectory, Callable[[], None]]]:
    """Open the run directory: read-only for a check, otherwise for exclusive use.

    Yields:
        The run directory, and ``Preflight.push``.
    """
    if verb == "evaluate" and config.evaluate.model is None:
        check_trained(config, ", or set evaluate.model to any model")
    if verb == "generate" and config.generate.model is None:
        check_trained(config, ", or set generate.model to any model")
    refuse_read_only(config)
    ensure_writable(config)
    if verb == "check":
        with open_read_only(config.run_place, terminal.line) as directory:
            yield directory, lambda: None
        return
    directory = RunDirectory.of(config.run_place)
    max_hours = None if verb == "tune" else config.train.max_hours  # in a sweep, it is that of each trial
    watch = watched(config.run_place, max_hours, terminal.line)
    with exclusive_access(directory, terminal), watch, synced(directory, terminal.line) as push:
        yield directory, push


def check_trained(config: Config, remedy: str = "") -> None:
    """Refuse a run directory without a trained model; ``remedy`` says what to do other than train."""
    directory = RunDirectory.of(config.run_place)
    with retry_for(FIRST_SECONDS):
        trained = directory.is_trained()
    if not trained:
        raise RequestError(f"{directory.place}: contains no trained model; train first (raysft train CONFIG){remedy}")


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


def check_engines(config: Config, nodes: Sequence[Node]) -> None:
    """Refuse an engine that is not installed or that the cluster cannot place."""
    if not config.generates:
        return
    from raysft.generate.engine_pool import size_pool
    from raysft.generate.engines import check_engine

    check_engine(config)
    size_pool(config, nodes, batches=config.generate.num_actors or 1)


def _placed(config: Config, nodes: Sequence[Node]) -> Config:
    check_resources(config, nodes)
    return config


def _shown(verb: Verb, trained: bool) -> tuple[str, ...]:
    """Sets whose images are read: a run that is already trained does not need them.

    >>> _shown("run", False), _shown("run", True), _shown("evaluate", True)
    (('train', 'eval'), (), ('eval',))
    """
    if verb == "evaluate":
        return ("eval",)
    return () if trained or verb == "generate" else ("train", "eval")


def _plan_run(
    asked: Config,
    directory: RunDirectory,
    nodes: Sequence[Node],
    changes: Changes,
    allow_changed: bool,
    verb: Verb,
    notify: Callable[[str], None],
) -> PlannedRun:
    from raysft.run.resumption import check_resumption

    config = with_recorded_batch_size(directory, asked)
    commits = recorded_commit(directory, config), recorded_reference_commit(directory, config)
    files = check_model_files(config, notify, *commits)
    config, prepared = prepare_data(config, files, notify, _shown(verb, directory.is_done() and not changes))
    identity = training_identity(config, files, prepared)
    if verb == "evaluate":
        check_evaluable(prepared.eval, prepared.eval_rows, notify)
    resumption = check_resumption(directory, config, prepared.train_rows, identity, changes, allow_changed)
    prepared = replace(prepared, train_rows=resumption.rows)
    if verb in TRAINS_ONE:
        done = resumption.cursor.step if resumption.cursor else 0
        check_best_metric(config, prepared, done, resumption.best(config, identity) is not None)
        if line := resumption.forgotten_best(config, identity):
            notify(f"{directory.place}: {line}")
    ends = untrained_ends(config, files, prepared)
    plan = make_plan(
        asked, prepared, nodes, files.adapter, ends, files.commit, files.reference, files.positions, files.hf_config
    )
    if verb in ESTIMATED:
        plan = with_needs(plan, config, files, prepared, nodes, table=verb == "check")
    return PlannedRun(config, files, prepared, plan, identity, resumption)
