"""Scoring of predictions: every metric over all sources and for each source, with 95% intervals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysft.config import Config
from raysft.generate.metrics.blocks import in_blocks
from raysft.generate.metrics.bootstrap import RESAMPLES, intervals, resampled_sums, totals
from raysft.generate.metrics.loading import BUILTIN_METRICS, loaded, named_failure
from raysft.generate.metrics.rows import MetricRow, ModelRole, flat_key, flat_results

if TYPE_CHECKING:  # importing evaluate takes seconds, and checking a config does not need it
    from raysft.generate.metrics.additive import AdditiveMetric

Estimate = tuple[float, tuple[float, float] | None]
"""A value and its 95% interval; None if the metric has no interval."""


def score_labelled(
    config: Config, predictions: Iterable[dict[str, Any]], model: ModelRole = "trained", by_tasks: bool = True
) -> list[MetricRow]:
    """Score the predictions that have a label to compare with, as ``score`` does; a row ``unscored`` counts the others, if any."""
    unscored = 0

    def labelled() -> Iterator[dict[str, Any]]:
        nonlocal unscored
        for row in predictions:
            if row["label"]:
                yield row
            else:
                unscored += 1

    rows = score(config, labelled(), model, by_tasks)
    return [*rows, MetricRow("unscored", None, model, unscored, unit="examples")] if unscored else rows


def score(
    config: Config, predictions: Iterable[dict[str, Any]], model: ModelRole = "trained", by_tasks: bool = True
) -> list[MetricRow]:
    """Score predictions over all sources and, if they come from several, for each source.

    Predictions are taken one at a time. What stays in memory are a few numbers for each of them; metrics that do not say how
    they add up get all texts at once.

    Args:
        config: names the metrics, and the seed of the intervals.
        predictions: objects with at least ``predict``, ``label`` and ``source``.
        model: the model that made the predictions.
        by_tasks: let tasks of the cluster score many predictions; else this process does it.

    Returns:
        A row ``examples`` for each group of predictions, then a row for each number that a metric gives. Additive metrics
        (all built-in ones) have intervals from two examples on.

    Raises:
        RunFailed: a metric failed on these predictions.
    """
    left = iter(predictions)
    first = list(islice(left, 1))
    if not first:
        return [MetricRow("examples", None, model, 0, unit="examples")]
    from raysft.generate.metrics.additive import AdditiveMetric

    with contextlib.ExitStack() as stack:
        modules: dict[str, Any] = {}
        for name in dict.fromkeys(config.generate.metrics):
            with named_failure(name):
                modules[name] = stack.enter_context(loaded(name))
        additive = {name: module for name, module in modules.items() if isinstance(module, AdditiveMetric)}
        others = {name: module for name, module in modules.items() if name not in additive}
        sources: list[str] = []
        # Other files may be missing on other nodes, and a class of others may expect all texts.
        kept = KeptTexts() if any(name not in BUILTIN_METRICS for name in modules) else None
        statistics = in_blocks(
            {name: module for name, module in additive.items() if name in BUILTIN_METRICS},
            _texts(chain(first, left), sources, kept),
            by_tasks,
        )
        for name, module in additive.items():
            if name not in statistics:
                assert kept is not None
                with named_failure(name):
                    values = np.asarray(module.statistics(kept.predictions, kept.references), dtype=np.float64)
                    statistics[name] = values.reshape(len(sources), -1)
        groups = _groups(sources)
        rows = [MetricRow("examples", name, model, len(group), unit="examples") for name, group in groups.items()]
        taken = set(flat_results(rows))
        for source, members in groups.items():
            chosen = slice(None) if source is None else members
            in_group = {name: statistics[name][chosen] for name in additive}
            estimates = _additive_estimates(additive, in_group, config.run.seed)
            if kept is not None:
                estimates |= _other_estimates(others, (kept.predictions, kept.references), members)
            for name, module in modules.items():
                rows += _rows(module, estimates[name], source, model, Path(name).stem, taken)
    return rows


@dataclass
class KeptTexts:
    """All texts, for metrics that need them at once."""

    predictions: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)


def _texts(
    predictions: Iterable[dict[str, Any]], sources: list[str], kept: KeptTexts | None
) -> Iterator[tuple[str, str]]:
    """Yield each prediction and its reference, and note its source."""
    names: dict[str, str] = {}
    for row in predictions:
        sources.append(names.setdefault(row["source"], row["source"]))  # one object for each name
        if kept is not None:
            kept.predictions.append(row["predict"])
            kept.references.append(row["label"])
        yield row["predict"], row["label"]


def _groups(sources: Sequence[str]) -> dict[str | None, np.ndarray]:
    """Indices of the examples that are scored together: all of them (None), and those of each of several sources.

    >>> {source: members.tolist() for source, members in _groups(["x", "y", "x"]).items()}
    {None: [0, 1, 2], 'x': [0, 2], 'y': [1]}
    """
    groups: dict[str | None, np.ndarray] = {None: np.arange(len(sources))}
    names = sorted(set(sources))
    if len(names) > 1:
        source_of = np.array(sources, dtype=object)
        groups.update({name: np.flatnonzero(source_of == name) for name in names})
    return groups


def _rows(
    module: Any, estimates: dict[str, Estimate], source: str | None, model: ModelRole, module_name: str, taken: set[str]
) -> list[MetricRow]:
    """Rows of one metric in one group. A metric whose key is taken gets the name of its module in front."""
    rows = []
    for key, (value, interval) in estimates.items():
        rows.append(
            MetricRow(
                f"{module_name}_{key}" if flat_key(key, source) in taken else key,
                source,
                model,
                value,
                *(interval or (None, None)),
                # Modules of other authors need not have these.
                unit=getattr(module, "unit", None),
                higher_is_better=getattr(module, "higher_is_better", None),
                signature=getattr(module, "signature", "") or None,
            )
        )
        taken |= set(flat_results(rows[-1:]))
    return rows


def _additive_estimates(
    modules: dict[str, AdditiveMetric], statistics: dict[str, np.ndarray], seed: int
) -> dict[str, dict[str, Estimate]]:
    """Values and intervals of additive metrics in one group of examples. All metrics use the same resamples.

    Args:
        modules: by name.
        statistics: [examples, statistics] of each metric.
        seed: of the resamples.
    """
    if not modules:
        return {}
    examples = len(next(iter(statistics.values())))
    # All resamples of one example are equal: there is no interval.
    resampled = resampled_sums(np.hstack(list(statistics.values())), seed, RESAMPLES if examples > 1 else 0)
    splits = np.cumsum([columns.shape[1] for columns in statistics.values()])[:-1]
    found: dict[str, dict[str, Estimate]] = {}
    for (name, module), sums in zip(modules.items(), np.split(resampled, splits, axis=1), strict=True):
        with named_failure(name):
            values = module.scores(totals(statistics[name]), examples)
            ends = intervals([module.scores(resample, examples) for resample in sums])
            found[name] = {key: (value, ends.get(key)) for key, value in values.items()}
    return found


def _other_estimates(
    modules: dict[str, Any], texts: tuple[list[str], list[str]], members: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Values of all other metrics, computed on the whole group: the mean over its parts may be another number."""
    predictions, references = ([side[i] for i in members] for side in texts)
    found: dict[str, dict[str, Estimate]] = {}
    for name, module in modules.items():
        with named_failure(name):
            numbers = _numbers(module.compute(predictions=predictions, references=references))
            found[name] = {key: (value, None) for key, value in numbers.items()}
    return found


def _numbers(results: Any) -> dict[str, float]:
    """The numbers among a module's results."""
    found = {}
    for key, value in (results or {}).items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[str(key)] = number
    return found
