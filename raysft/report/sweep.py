"""Read what a sweep wrote: its config, ``trials.jsonl``, and the evaluations of its trials."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from raysft.errors import RequestError
from raysft.metric_names import directions
from raysft.report.axes import Axis
from raysft.report.read_run import RunLog, finite, read_evaluations, read_lines, read_object, read_run
from raysft.storage.run_directory import RunDirectory

FEWEST_DONE = 4
"""Number of finished trials from which they alone decide the axis of results."""
STATES = ("done", "stopped", "running", "failed")


@dataclass(frozen=True)
class Trial:
    """The last line of a trial in ``trials.jsonl``."""

    name: str
    number: int
    configuration: str
    """Equal for trials that differ in their seeds only."""
    values: dict[str, Any]
    """Value by dotted key."""
    seed: int | None
    state: str
    step: int | None
    metrics: dict[str, Any]
    reason: str
    seconds: float | None
    parents: tuple[tuple[str, int], ...] = ()
    """Whose checkpoint it went on from, and at which step, the oldest first."""


@dataclass(frozen=True)
class Configuration:
    """The trials of one configuration that have results."""

    name: str
    values: dict[str, Any]
    trials: list[Trial]
    results: list[list[float]]
    """[trials, objectives]"""

    @property
    def means(self) -> list[float]:
        """[objectives] over the trials."""
        return [statistics.fmean(column) for column in zip(*self.results, strict=True)]

    @property
    def spreads(self) -> list[float] | None:
        """[objectives] standard deviations; None for a single trial."""
        if len(self.trials) < 2:
            return None
        return [statistics.stdev(column) for column in zip(*self.results, strict=True)]


@dataclass(frozen=True)
class Sweep:
    """A sweep as its page shows it."""

    log: RunLog
    trials: list[Trial]
    """In the order of their numbers."""
    results: dict[str, Any]
    """``tune_results.json``; empty until the sweep ends."""
    problems: list[str] = field(default_factory=list)
    """A line for each file that is corrupt and left out."""

    @property
    def objectives(self) -> list[tuple[str, bool]]:
        """(metric, True if the lowest value is best), at least one."""
        metric, mode = self.log.option("tune.metric", "eval_loss"), self.log.option("tune.mode", None)
        metrics = [str(name) for name in metric] if isinstance(metric, list) and metric else [str(metric)]
        highest = [*directions(metrics, mode), *([None] * len(metrics))]  # a damaged config may name too few
        return [(name, not each) for name, each in zip(metrics, highest, strict=False)]

    @cached_property
    def configurations(self) -> list[Configuration]:
        """Those with results, the best mean of the first objective first; those of a Pareto front before the others."""
        found: dict[str, Configuration] = {}
        for trial in self.trials:
            values = [finite(trial.metrics.get(metric)) for metric, _ in self.objectives]
            row = [value for value in values if value is not None]
            if trial.state in ("done", "stopped") and len(row) == len(values):
                one = found.setdefault(trial.configuration, Configuration(trial.configuration, trial.values, [], []))
                one.trials.append(trial)
                one.results.append(row)
        sign = 1 if self.objectives[0][1] else -1
        ordered = sorted(found.values(), key=lambda one: sign * one.means[0])
        names = [str(row.get("configuration")) for row in _rows(self.results.get("configurations"))]
        if any(trial.state == "running" for trial in self.trials):
            return ordered  # the file is that of an earlier call, if there is one
        ranked = [found[name] for name in names if name in found]
        # Those that the sweep has not ranked are of another space, which it had before.
        return [*ranked, *(one for one in ordered if one.name not in names)]

    @property
    def keys(self) -> list[str]:
        """Dotted keys that vary, in the order of ``tune.space``."""
        keys = dict.fromkeys([*self.space, *(key for trial in self.trials for key in trial.values)])
        return [str(key) for key in keys]

    @property
    def space(self) -> dict[str, Any]:
        """``tune.space``."""
        return _object(self.log.option("tune.space"))

    @property
    def repeats(self) -> int:
        """Largest number of trials of a configuration."""
        return max(Counter(trial.configuration for trial in self.trials).values(), default=0)

    def axis(self, key: str) -> Axis:
        """The axis of a key that varies, logarithmic where its range is."""
        space = self.space.get(key)
        kind = next(iter(space)) if isinstance(space, dict) and len(space) == 1 else ""
        listed = kind in ("", "choice")
        # A trial without results, which is not drawn, may have the value that made it fail.
        values = [one.values[key] for one in self.configurations if key in one.values]
        values = values or [trial.values[key] for trial in self.trials if key in trial.values]
        return Axis.of(values, None if listed else kind.startswith("log"), listed)

    @property
    def result_axis(self) -> Axis:
        """The axis of the first objective. Stopped trials stand at its end if they are far worse than those that are done."""
        pairs = [pair for one in self.configurations for pair in zip(one.trials, one.results, strict=True)]
        done, every = [row[0] for trial, row in pairs if trial.state == "done"], [row[0] for _, row in pairs]
        return Axis.of_results(done if len(done) >= FEWEST_DONE else every, self.objectives[0][1])

    def place(self, trial: Trial) -> RunDirectory:
        """The run directory of a trial. Of a remote one, only the files that were fetched are there."""
        remote = self.log.directory.remote
        return RunDirectory(
            self.log.directory.path / "trials" / trial.name, remote / "trials" / trial.name if remote else None
        )


def read_sweep(directory: RunDirectory) -> Sweep:
    """Read a sweep.

    Raises:
        RequestError: the folder is not a run directory, or ``config.yaml`` or ``trials.jsonl`` is corrupt.
    """
    lines = list(read_lines(directory.trials))
    trials: dict[str, Trial] = {}
    for line in lines:
        name = str(line.get("trial"))
        before = trials[name].parents if name in trials else ()
        trials[name] = _trial(name, line, before)
    problems: list[str] = []
    results: dict[str, Any] = {}
    try:
        results = read_object(directory.path / "tune_results.json")
    except RequestError as error:
        problems.append(str(error))
    return Sweep(read_run(directory), sorted(trials.values(), key=lambda trial: trial.number), results, problems)


def evaluations(sweep: Sweep, trial: Trial) -> list[dict[str, Any]]:
    """Evaluation records of a trial in the order of their steps; empty if it has none. A corrupt log is noted."""
    run = sweep.place(trial)
    if run.remote and not run.trainer_log.exists():
        with suppress(FileNotFoundError):
            (run.remote / run.trainer_log.name).download(run.trainer_log)
    try:
        return read_evaluations(run)
    except RequestError as error:
        sweep.problems.append(str(error))
        return []


def _trial(name: str, line: dict[str, Any], parents: tuple[tuple[str, int], ...]) -> Trial:
    parent, values, metrics = (_object(line.get(key)) for key in ("parent", "values", "metrics"))
    started, ended = finite(line.get("started")), finite(line.get("ended"))
    if (
        isinstance(parent.get("step"), int)
        and (event := (str(parent.get("trial")), parent["step"])) not in parents[-1:]
    ):
        parents = (*parents, event)
    return Trial(
        name,
        int(finite(line.get("number")) or 0),
        str(line.get("configuration") or name),
        values,
        line["seed"] if isinstance(line.get("seed"), int) else None,
        str(line.get("state")),
        line["step"] if isinstance(line.get("step"), int) else None,
        metrics,
        str(line.get("reason") or ""),
        ended - started if started and ended else None,
        parents,
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows(value: Any) -> Sequence[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
