"""What a sweep leaves: ``tune_results.json``, ``trials.csv`` and ``best.yaml``, and the lines that it ends with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysft.config import Config, with_overrides
from raysft.errors import RequestError
from raysft.storage.json_files import write_atomically, write_json
from raysft.telemetry.terminal import Terminal
from raysft.tune.ranking import Objectives, Ranked, indistinguishable, ranked
from raysft.tune.record import TrialRecord
from raysft.tune.trials import Trial, described


def check_recorded(config: Config, records: Mapping[str, TrialRecord]) -> None:
    """Refuse a metric that a trial which is done does not have.

    Raises:
        RequestError: names the results that there are.
    """
    for record in records.values():
        for metric in Objectives.of(config.tune).metrics:
            if record.state == "done" and metric not in record.metrics:
                raise RequestError(
                    f"tune.metric={metric!r} is not a result of these runs; use one of {', '.join(sorted(record.metrics))}"
                )


def rank(config: Config, records: Mapping[str, TrialRecord]) -> list[Ranked]:
    """Rank the configurations of a sweep by the trials that have finite metrics, the best first.

    A configuration counts if no scheduler stopped any of its trials: results of fewer steps do not compare. If that leaves none,
    all count.

    Args:
        config: the sweep's config.
        records: record of each trial, in the order of the sweep.
    """
    objectives, by_configuration = Objectives.of(config.tune), dict[str, list[tuple[TrialRecord, tuple[float, ...]]]]()
    for record in records.values():
        if record.ended_well and (values := objectives.values(record.metrics)) is not None:
            by_configuration.setdefault(record.configuration, []).append((record, values))
    stopped = {record.configuration for record in records.values() if record.state == "stopped"}
    if set(by_configuration) - stopped:
        by_configuration = {name: found for name, found in by_configuration.items() if name not in stopped}
    return ranked(
        [
            Ranked(name, found[0][0].values, tuple(record.trial for record, _ in found), tuple(row for _, row in found))
            for name, found in by_configuration.items()
        ],
        objectives,
    )


def write_results(
    directory: Path, config: Config, records: Mapping[str, TrialRecord], ranking: Sequence[Ranked]
) -> None:
    """Write ``tune_results.json`` and ``trials.csv``."""
    objectives = Objectives.of(config.tune)
    trials = []
    for one in ranking:
        for trial, row in zip(one.trials, one.results, strict=True):
            trials.append((row, trial, one.values))
    trials.sort(key=lambda found: objectives.cost(found[0]))
    results: dict[str, Any] = {
        "metric": config.tune.metric,
        "mode": objectives.modes[0] if isinstance(config.tune.metric, str) else objectives.modes,
        "trials": [
            {"run": trial, **dict(zip(objectives.metrics, row, strict=True)), "config": values}
            for row, trial, values in trials
        ],
        "configurations": [_summary(one, objectives) for one in ranking],
    }
    if len(objectives.metrics) > 1:
        results["front"] = [one.configuration for one in ranking if one.on_front]
    elif len(ranking) > 1 and all(len(one.trials) > 1 for one in ranking[:2]):
        results["told_apart"] = not indistinguishable(ranking[0], ranking[1])
    write_json(directory / "tune_results.json", results)
    write_atomically(directory / "trials.csv", _table(records))


def _summary(one: Ranked, objectives: Objectives) -> dict[str, Any]:
    means = dict(zip(objectives.metrics, one.means, strict=True))
    deviations = zip(objectives.metrics, one.deviations or (), strict=False)
    return {
        "configuration": one.configuration,
        "config": one.values,
        "runs": list(one.trials),
        "n": len(one.trials),
        **means,
        **{f"{metric}_std": deviation for metric, deviation in deviations},
    }


def _table(records: Mapping[str, TrialRecord]) -> str:
    """Return CSV with a row for each trial."""
    rows = list(records.values())
    keys = list(dict.fromkeys(key for record in rows for key in record.values))
    metrics = sorted({key for record in rows for key in record.metrics})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "number", "configuration", "state", *keys, "seed", *metrics, "step", "seconds", "reason"])
    for record in rows:
        values = [_cell(record.values.get(key)) for key in keys]
        results = [_cell(record.metrics.get(key)) for key in metrics]
        begin = [record.trial, record.number, record.configuration, record.state]
        end = [_cell(record.step), _cell(record.seconds), record.reason]
        table.writerow([*begin, *values, record.seed, *results, *end])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "" if value is None else json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def write_best(directory: Path, config: Config, best: Ranked) -> Config:
    """Write ``best.yaml``, a config for one run with the best values, and return it."""
    found = _best_config(config, best)
    write_atomically(directory / "best.yaml", found.to_yaml())
    return found


def is_written(directory: Path, config: Config, best: Ranked) -> bool:
    """True if ``best.yaml`` is already this configuration's."""
    place = directory / "best.yaml"
    return place.exists() and place.read_text(encoding="utf-8") == _best_config(config, best).to_yaml()


def _best_config(config: Config, best: Ranked) -> Config:
    return with_overrides(config, {**best.values, "run.name": f"{config.run.name}-best", "tune": {}})


def print_ranking(config: Config, ranking: Sequence[Ranked], terminal: Terminal) -> None:
    """Print a line for each configuration, the best first, and how far the best two can be told apart."""
    objectives = Objectives.of(config.tune)
    several = len(objectives.metrics) > 1
    for one in ranking:
        front = " | on the Pareto front" if several and one.on_front else ""
        terminal.line(f"{_measured(one, objectives)} | {described(one.values)} | {one.configuration}{front}")
    if not several and len(ranking) > 1 and indistinguishable(ranking[0], ranking[1]):
        terminal.line(
            f"{described(ranking[0].values)} cannot be told apart from {described(ranking[1].values)} with "
            f"{len(ranking[0].trials)} and {len(ranking[1].trials)} seeds (Welch's t-test at 5 %); raise tune.repeats"
        )
    terminal.line(f"best config: {config.run_place / 'best.yaml'}{_choice(objectives, ranking)}")


def _choice(objectives: Objectives, ranking: Sequence[Ranked]) -> str:
    """Say which configuration of a front is the best."""
    size = sum(one.on_front for one in ranking)
    if len(objectives.metrics) < 2:
        return ""
    return f" (of {size} on the Pareto front, the one with the best {objectives.metrics[0]})"


def _measured(one: Ranked, objectives: Objectives) -> str:
    spread = [f" ± {deviation:.4f} (n={len(one.trials)})" for deviation in one.deviations or ()]
    parts = zip(objectives.metrics, one.means, spread or [""] * len(one.means), strict=True)
    return ", ".join(f"{metric} {value:.4f}{spread}" for metric, value, spread in parts)


def expected(records: Mapping[str, TrialRecord], trials: Sequence[Trial]) -> dict[str, TrialRecord]:
    """Return the records of a sweep's trials, in the order of their numbers: those of other spaces are left out."""
    names = {trial.name for trial in trials}
    return {name: record for name, record in records.items() if name in names}
