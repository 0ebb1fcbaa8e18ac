"""Scoring of predictions: every metric over all sources and for each source, with 95% intervals."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from raysft.config import Config
from raysft.errors import RunFailed
from raysft.generate.engine_pool import quiet_ray_data
from raysft.generate.metrics.bootstrap import RESAMPLES, intervals, resampled_sums, totals
from raysft.generate.metrics.loading import BUILTIN_METRICS, loaded, named_failure
from raysft.generate.metrics.rows import MetricRow, ModelRole, flat_key, flat_results

if TYPE_CHECKING:  # importing evaluate takes seconds, and checking a config does not need it
    from raysft.generate.metrics.additive import AdditiveMetric

PARALLEL_FROM = 500
"""Number of examples from which Ray tasks are faster than this process: starting them takes seconds."""
_BLOCK = 100
"""Fewest examples that a task scores."""
_MOST_BLOCKS = 2000

Estimate = tuple[float, tuple[float, float] | None]
"""A value and its 95% interval; None if the metric has no interval."""


def score(config: Config, predictions: Sequence[dict[str, Any]], model: ModelRole = "trained") -> list[MetricRow]:
    """Score predictions over all sources and, if they come from several, for each source.

    Args:
        config: names the metrics, and the seed of the intervals.
        predictions: objects with at least ``predict``, ``label`` and ``source``.
        model: the model that made the predictions.

    Returns:
        A row ``examples`` for each group of predictions, then a row for each number that a metric gives. Additive metrics
        (all built-in ones) have intervals from two examples on.

    Raises:
        RunFailed: a metric failed on these predictions.
    """
    groups = _groups([prediction["source"] for prediction in predictions])
    rows = [MetricRow("examples", name, model, len(group), unit="examples") for name, group in groups.items()]
    if not predictions:
        return rows
    from raysft.generate.metrics.additive import AdditiveMetric

    texts = [row["predict"] for row in predictions], [row["label"] for row in predictions]
    taken = set(flat_results(rows))
    with contextlib.ExitStack() as stack:
        modules: dict[str, Any] = {}
        for name in dict.fromkeys(config.generate.metrics):
            with named_failure(name):
                modules[name] = stack.enter_context(loaded(name))
        additive = {name: module for name, module in modules.items() if isinstance(module, AdditiveMetric)}
        others = {name: module for name, module in modules.items() if name not in additive}
        statistics = _statistics(additive, *texts)
        for source, members in groups.items():
            in_group = {name: values[members] for name, values in statistics.items()}
            estimates = _additive_estimates(additive, in_group, config.run.seed)
            estimates |= _other_estimates(others, texts, members)
            for name, module in modules.items():
                rows += _rows(module, estimates[name], source, model, Path(name).stem, taken)
    return rows


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


def _statistics(
    modules: dict[str, AdditiveMetric], predictions: list[str], references: list[str]
) -> dict[str, np.ndarray]:
    """[examples, statistics] of each metric, computed by Ray tasks if there are enough examples."""
    found: dict[str, np.ndarray] = {}
    builtin = [name for name in modules if name in BUILTIN_METRICS]  # other files may be missing on other nodes
    if builtin and len(predictions) >= PARALLEL_FROM and ray.is_initialized():
        with named_failure(", ".join(builtin)):
            found = _statistics_by_tasks(builtin, predictions, references)
    for name, module in modules.items():
        if name not in found:
            with named_failure(name):
                values = np.asarray(module.statistics(predictions, references), dtype=np.float64)
                found[name] = values.reshape(len(predictions), -1)
    return {name: found[name] for name in modules}


def _statistics_by_tasks(names: list[str], predictions: list[str], references: list[str]) -> dict[str, np.ndarray]:
    """[examples, statistics] of each metric, computed by tasks of Ray Data.

    Raises:
        RunFailed: a metric failed.
    """

    def score_block(block: pa.Table) -> dict[str, np.ndarray]:
        texts = block["predict"].to_pylist(), block["label"].to_pylist()
        found = {"index": block["index"].to_numpy()}
        try:
            for name in names:
                with named_failure(name), loaded(name) as module:
                    found[name] = module.statistics(*texts)
        except RunFailed as error:
            return {"error": np.array([str(error)])}  # Ray Data would hide the message of a raised error
        return found

    table = pa.table({"index": np.arange(len(predictions)), "predict": predictions, "label": references})
    size = max(_BLOCK, len(predictions) // _MOST_BLOCKS)
    with quiet_ray_data():
        blocks = ray.data.from_arrow([table.slice(start, size) for start in range(0, len(predictions), size)])
        scored = blocks.map_batches(score_block, batch_size=None, batch_format="pyarrow")
        parts: list[Any] = list(scored.iter_batches(batch_size=None, batch_format="numpy"))
    for part in parts:
        if "error" in part:
            raise RunFailed(str(part["error"][0]))
    order = np.argsort(np.concatenate([part["index"] for part in parts]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in names}


def _numbers(results: Any) -> dict[str, float]:
    """The numbers among a module's results."""
    found = {}
    for key, value in (results or {}).items():
        number = value.item() if isinstance(value, np.generic) else value
        if isinstance(number, int | float) and not isinstance(number, bool):
            found[str(key)] = number
    return found
