"""What happens to trials: a line on the terminal and a line in the record for each event, and the end of a hopeless sweep."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.tune
import ray.tune.stopper
from ray.air.constants import EXPR_ERROR_PICKLE_FILE
from ray.exceptions import RayActorError
from ray.tune.result import AUTO_RESULT_KEYS

from raysft.config import Config
from raysft.errors import RequestError, RunFailed, one_line
from raysft.telemetry.terminal import Terminal
from raysft.tune.best_model import remove_weights
from raysft.tune.ranking import Objectives
from raysft.tune.record import Record, TrialRecord, numbers
from raysft.tune.table import TrialTable, trial_table
from raysft.tune.trainable import INTERRUPTED
from raysft.tune.trials import described

OTHERS = frozenset(AUTO_RESULT_KEYS) | {"step", "current_steps"}
"""Numbers in a trial's results that are not results of its run."""


class Recorder(ray.tune.Callback):
    """Records what becomes of each trial, and shows it: in a table on a terminal, else in a line for each event."""

    def __init__(
        self,
        objectives: Objectives,
        record: Record,
        table: TrialTable | None = None,
        prune: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            objectives: what trials are compared by.
            record: where their changes are recorded.
            table: shows them; None without a terminal.
            prune: called when a trial has ended.
        """
        self._objectives, self._record, self.view, self.prune = objectives, record, table, prune
        self._last: dict[str, TrialRecord] = {}
        self._earlier = {name: known for name, known in record.read().items() if not known.ended_well}
        """Of an earlier call, the trials that continue."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal out, which the sweep has, too: Tune pickles its callbacks, and uses only the originals."""
        return {**vars(self), "view": None, "prune": None}

    def close(self) -> None:
        """Remove the table."""
        if self.view is not None:
            self.view.close()

    def _say(self, line: str) -> None:
        """Print a line that a table would show."""
        if self.view is None:
            Terminal().line(line)

    def _keep(self, record: TrialRecord) -> TrialRecord:
        """Keep and show a trial's latest record."""
        self._last[record.trial] = record
        if self.view is not None:
            self.view.show(record)
        return record

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial starts, for the first time or again."""
        given = trial.config
        known = self._last.get(given["trial"])
        started = known or TrialRecord(
            trial=given["trial"],
            number=given["number"],
            configuration=given["configuration"],
            values={},
            seed=json.loads(given["config"])["run"]["seed"],
            started=round(time.time(), 3),
        )
        if known is None and (earlier := self._earlier.get(started.trial)) is not None:
            started = replace(started, step=earlier.step, metrics=earlier.metrics, parent=earlier.parent)
        changes = {"values": json.loads(given["values"]), "state": "running", "reason": "", "ended": None}
        started = self._keep(self._record.update(started, **changes))
        self._say(f"{'resumed' if known else 'started'}: {_shown(started)}")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """A trial reports an evaluation, or the results of its whole run."""
        changes: dict[str, Any] = {}
        if is_final(result):
            changes = {"state": "done"}
        elif INTERRUPTED in result:
            changes = {"state": "interrupted", "reason": result[INTERRUPTED]}
        self._update(trial, result, **changes, **({"ended": round(time.time(), 3)} if changes else {}))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has ended by itself, or was ended by a scheduler."""
        ended = self._last[trial.config["trial"]]
        if ended.state == "running":
            ended = self._update(trial, {}, state="stopped", ended=round(time.time(), 3))
        results = [(metric, ended.metrics[metric]) for metric in self._objectives.metrics if metric in ended.metrics]
        if results:
            found = ", ".join(f"{metric} {_number(value)}" for metric, value in results)
            self._say(f"{ended.state}: {_shown(ended)} | {found}")
        self.prune()

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has failed, and starts again."""
        failed = self._update(trial, {}, reason=str(_error(trial)))
        Terminal().line(f"failed, and restarts: {_shown(failed)} | {failed.reason}")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        failed = self._update(trial, {}, state="failed", reason=str(_error(trial)), ended=round(time.time(), 3))
        Terminal().line(f"failed: {_shown(failed)} | {failed.reason}")

    def _update(self, trial: Any, result: Any, **changes: Any) -> TrialRecord:
        """Record a trial's latest results and other changes."""
        last = self._last[trial.config["trial"]]
        if found := numbers(result, OTHERS):
            step = result.get("step", result.get("current_steps", result.get("total_steps")))
            changes |= {"metrics": {**last.metrics, **found}, "step": step}
        if parent := result.get("parent"):
            changes |= {"parent": parent}
        return self._keep(self._record.update(last, **changes))


class WithoutMetric(ray.tune.stopper.Stopper):
    """Stops the sweep after the first trial without a metric: no other trial would have it."""

    def __init__(self, objectives: Objectives) -> None:
        self._metrics, self._found = objectives.metrics, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Look at a trial's results; no trial is stopped by itself."""
        self._found = self._found or (is_final(result) and any(metric not in result for metric in self._metrics))
        return False

    def stop_all(self) -> bool:
        """Return True if a trial ended without a metric."""
        return self._found


def recorder(
    config: Config, record: Record, total: int, concurrent: int, known: Callable[[], Mapping[str, TrialRecord]]
) -> Recorder:
    """Return the callback that records and shows a sweep of this many trials, running this many at a time.

    Args:
        config: the sweep's config.
        record: where changes are recorded.
        total: number of trials.
        concurrent: number of trials at a time.
        known: returns the records of the sweep's trials; trials of another space are not compared with them.
    """
    objectives = Objectives.of(config.tune)
    table = trial_table(objectives, total, concurrent)
    keeps_all = config.tune.keep == "all"
    return Recorder(objectives, record, table, lambda: None if keeps_all else remove_weights(config, known()))


def stopper(config: Config) -> WithoutMetric:
    """Return what ends a sweep whose trials lack a metric."""
    return WithoutMetric(Objectives.of(config.tune))


def is_final(result: Any) -> bool:
    """True if a trial's results are those of its whole run."""
    return "run_name" in result


def reason_of(error: Any) -> Exception:
    """Return the error that a trial failed with, as one of ours with a one-line message."""
    while getattr(error, "cause", None) is not None:
        error = error.cause
    if isinstance(error, RequestError | RunFailed):
        return error
    if isinstance(error, RayActorError):
        return RunFailed("the trial's process died (it was killed, its machine failed, or it ran out of memory)")
    if isinstance(error, str):
        # If Tune has no error object, it gives the text of the traceback, which ends with the error.
        return RunFailed(one_line(error.strip().rpartition("\n")[2]))
    return RunFailed(f"{type(error).__name__}: {one_line(error)}")


def _error(trial: Any) -> Exception:
    """Return the error that a trial failed with. Tune forgets that of a trial that starts again, but keeps its file."""
    kept = Path(trial.local_path, EXPR_ERROR_PICKLE_FILE)
    error = trial.get_pickled_error() or trial.get_error()
    if error is None and kept.exists():
        error = ray.cloudpickle.loads(kept.read_bytes())
    return reason_of(error)


def _shown(record: TrialRecord) -> str:
    seed = f", seed {record.seed}" if record.trial != record.configuration else ""
    return described(record.values) + seed


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
