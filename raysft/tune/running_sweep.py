"""A sweep under way: Ray Tune runs its trials, and what came of them is written."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysft.config import Config
from raysft.environment import environment
from raysft.errors import RunFailed, RunStopped
from raysft.stopping import current
from raysft.storage.run_directory import RunDirectory
from raysft.telemetry.terminal import Terminal
from raysft.telemetry.trackers import tracker_variables
from raysft.train.mailbox import Mailbox
from raysft.tune.best_model import provide_model, remove_weights
from raysft.tune.record import Record, TrialRecord
from raysft.tune.results import check_recorded, expected, print_ranking, rank, write_best, write_results
from raysft.tune.sources import Source
from raysft.tune.trials import TRIAL_CPUS, Trial, repeats

ENVIRONMENT = {
    # The new output prints tables even at verbose=0, and has no other switch.
    "RAY_AIR_NEW_OUTPUT": "0",
    # A trial whose time was over has no metric; whether those that ended have it is checked when the sweep ends.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Its handler would end the trials without a checkpoint; ours asks them to stop.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
"""What Tune reads from the environment while a sweep runs."""


@dataclass(frozen=True)
class Sweep:
    """A sweep whose trials are known and may start."""

    config: Config
    source: Source
    record: Record
    total: int
    """Number of its trials."""
    concurrent: int
    """Number of trials at a time."""
    deadline: float | None
    """Time after which no trial starts or trains, in seconds since 1970."""
    terminal: Terminal

    def fit(self, search: Any, scheduler: Any) -> dict[str, Exception] | None:
        """Run the trials that have not ended, and return the error of each that failed by its name; None after an interruption."""
        import ray.tune

        from raysft.tune.abandoned import AbandonedGroups
        from raysft.tune.progress import reason_of, recorder, stopper

        config = self.config
        space, searched = self._space(search, scheduler)
        if not space and not searched:
            return {}
        mailbox, stopping = Mailbox(), current()
        watching = recorder(config, self.record, self.total, self.concurrent, self._records)
        # Tune's own records, which nothing reads again: a sweep continues from its own.
        with tempfile.TemporaryDirectory(prefix="raysft-tune-", ignore_cleanup_errors=True) as folder:
            tuner = ray.tune.Tuner(
                _trainable(config, self.deadline, mailbox),
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
                    callbacks=[watching, AbandonedGroups()],
                    stop=stopper(config),
                    failure_config=ray.tune.FailureConfig(max_failures=config.tune.max_failures),
                ),
            )
            try:
                with (
                    _tune_environment(),
                    stopping.ending_by_itself(),
                    stopping.telling(lambda it: mailbox.stop(it.reason)),
                ):
                    grid = tuner.fit()
            finally:
                watching.close()
                mailbox.close()
        errors = {Path(result.path).name: reason_of(result.error) for result in grid if result.error}
        return errors if search.finished else None

    def _trials(self) -> list[Trial]:
        return [trial for first in self.source.trials for trial in repeats(self.config, first)]

    def _records(self) -> dict[str, TrialRecord]:
        return expected(self.record.read(), self._trials())

    def _space(self, search: Any, scheduler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return Tune's search space, and the arguments of its search; both are empty for a population that has ended."""
        import ray.tune

        if self.config.tune.scheduler != "pbt":
            return {}, {"search_alg": search, "num_samples": -1, "max_concurrent_trials": self.concurrent}
        from raysft.tune.population import members

        scheduler.members = members(search, self.record.read())
        # Names alone: Tune replaces lists and mappings by placeholders.
        return ({"trial": ray.tune.grid_search(list(scheduler.members))} if scheduler.members else {}), {}

    def conclude(self, errors: Mapping[str, Exception] | None) -> Config:
        """Write and show what the trials came to, and return the best config; also where some have not ended.

        Args:
            errors: of each trial that failed; None if the search was interrupted.

        Raises:
            RunFailed: trials failed, or none has a result.
            RequestError: the trials lack a metric.
            RunStopped: the sweep or a trial was asked to stop, so that trials have not ended.
        """
        config, terminal = self.config, self.terminal
        trials, records = self._trials(), self._records()
        check_recorded(config, records)
        ended = sum(record.state in ("done", "stopped", "failed") for record in records.values())
        time_over = self.deadline is not None and time.time() >= self.deadline
        if stopped := self._stopped(errors, len(trials) - ended, self.total - ended, time_over):
            self._show(records, over=False)
            raise stopped
        if errors is None:
            raise KeyboardInterrupt  # Tune has handled a signal and returned
        if left := self.total - ended if time_over else 0:
            terminal.line(
                f"tune.max_minutes={config.tune.max_minutes} is over, and {left} of {self.total} trials have not ended; run "
                "the same command again to continue with them"
            )
        best, first_error = self._show(records, over=not left), next(iter(errors.values()), None)
        if best is None:
            nothing = (
                f"no trial has ended within tune.max_minutes={config.tune.max_minutes}; run the same command again"
            )
            raise first_error or RunFailed(nothing if left else f"no trial gave a finite {config.tune.metric}")
        if errors:
            raise RunFailed(
                f"{len(errors)} of {len(trials)} trials failed ({first_error}); best.yaml is the best of the others; run the "
                "same command again to retry the failed ones"
            )
        return best

    def _stopped(
        self, errors: Mapping[str, Exception] | None, begun: int, left: int, time_over: bool
    ) -> RunStopped | None:
        """Return what ends a sweep that was asked to stop, or a trial of which was; None if neither was.

        Args:
            errors: as ``conclude`` takes them.
            begun: trials that are known and have not ended; a search may not have suggested all of them.
            left: all trials that have not ended.
            time_over: True if ``tune.max_minutes`` are over.
        """
        stop = current().request
        if stop is not None and left > 0:
            return RunStopped(f"stopped: {stop.reason}; {left} of {self.total} trials have not ended")
        if errors is not None and begun > 0 and not time_over:
            return RunStopped(f"stopped: {begun} of {self.total} trials were asked to stop")
        return None

    def _show(self, records: Mapping[str, TrialRecord], over: bool) -> Config | None:
        """Write and print the ranking of the trials that are done, and where the best config, the model and the page are.

        Args:
            records: of all trials.
            over: True if no trial is to continue.

        Returns:
            The best config; None if no trial has a result.
        """
        from raysft.report.sweep_page import write_sweep_page

        config, terminal = self.config, self.terminal
        ranking = rank(config, records)
        write_results(config.run_directory, config, records, ranking)
        if not ranking:
            return None
        print_ranking(config, ranking, terminal)
        model = provide_model(config, ranking[0])
        terminal.line(f"best model: {model or 'none is left; to train it, use raysft run with best.yaml'}")
        remove_weights(config, records, over)
        best = write_best(config.run_directory, config, ranking[0])
        terminal.line(f"page: {config.run_place / write_sweep_page(RunDirectory.of(config.run_place)).name}")
        return best


@contextlib.contextmanager
def _tune_environment() -> Iterator[None]:
    """Silence Tune's tables, tracebacks and advice: we print a line for each trial, and each failure once."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with environment(**ENVIRONMENT), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
            yield
    finally:
        logger.setLevel(level)


def _trainable(config: Config, deadline: float | None, mailbox: Mailbox) -> Any:
    import ray.tune

    from raysft.tune.trainable import Trainable, TrialSettings

    settings = TrialSettings(
        scheduled=config.tune.scheduler != "none",
        home=os.getcwd(),
        environment=tracker_variables(),
        deadline=deadline,
        mailbox=mailbox,
        restarts=config.tune.max_failures > 0,
    )
    trial = ray.tune.with_parameters(Trainable, settings=settings)
    return ray.tune.with_resources(trial, {"cpu": TRIAL_CPUS})
